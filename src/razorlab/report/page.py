"""From a folder of records to one self-contained page. No torch, no hydra, no network."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined

from razorlab.errors import UserError
from razorlab.recall import command_of
from razorlab.records import find_records, read_record
from razorlab.tables import (
    accuracy_against_peak,
    load_runs,
    memory_by_layer,
    memory_by_part,
    memory_by_role,
    summarise,
)
from razorlab.tables.collect import row_label
from razorlab.tables.figures import PART_COLUMNS
from razorlab.tables.render import caption, cells, parts

LAYER_ROWS = 3  # bars beside each other that can still be told apart


@dataclass(frozen=True)
class Figure:
    """A picture: its caption, and itself as a data address."""

    caption: str
    source: str


@dataclass(frozen=True)
class Section:
    """The runs of one experiment, model and data set. ``tables``: of each its headings and rows."""

    title: str
    caption: str
    tables: list[tuple[list[str], list[list[str]]]]
    figures: list[Figure]
    runs: list[dict[str, Any]]


def write_report(folder: Path, page: Path) -> int:
    """Write the page of every record below ``folder``; return how many records are in it.

    Args:

    Raises:
        UserError: no record there, a damaged one, or the page cannot be written.
    """
    runs = load_runs(folder)
    records = [read_record(path) for path in find_records(folder)]
    sections = [_section(str(title), group, records) for title, group in runs.groupby(_titles(runs), sort=True)]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    text = template.render(
        sections=sections,
        circumstances=_circumstances(records),
        made=datetime.now(UTC).isoformat(timespec="minutes"),
        folder=str(folder),
        count=len(runs),
    )
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{page} cannot be written ({error.strerror}): give another file with --out") from error
    return len(runs)


def _titles(runs: pd.DataFrame) -> list[str]:
    """Return the section of each run: its table, if it belongs to one, its model and its data set."""
    titles = []
    for row in runs.itertuples():
        table = row.experiment.partition("/")[0] if isinstance(row.experiment, str) else ""
        titles.append(f"{table + ': ' if table else ''}{row.model} on {row.data}")
    return titles


def _section(title: str, runs: pd.DataFrame, records: list[dict[str, Any]]) -> Section:
    runs = runs.reset_index(drop=True)
    summary = summarise(runs)
    texts = [text for text in (cells(summary), parts(summary)) if text is not None]
    mine = set(zip(runs["config_hash"], runs["seed"], strict=True))
    chosen = [record for record in records if (record["config_hash"], record["seed"]) in mine]
    return Section(
        title=title,
        caption=caption(runs),
        tables=[(list(text.columns), text.to_numpy().tolist()) for text in texts],
        figures=_figures(runs, summary),
        runs=[_run(record) for record in sorted(chosen, key=lambda r: (row_label(r["config"]), r["seed"]))],
    )


def _run(record: Mapping[str, Any]) -> dict[str, Any]:
    around = record["circumstances"]
    return {
        "label": row_label(record["config"]),
        "seed": record["seed"],
        "hash": record["config_hash"],
        "command": command_of(record),
        "accuracy": f"{record['test']['top1']:.2f}",
        "epoch": record.get("best_epoch", ""),
        "steps": record.get("steps", ""),
        "date": around.get("date", ""),
        "commit": around.get("git_commit") or "",
    }


def _figures(runs: pd.DataFrame, summary: pd.DataFrame) -> list[Figure]:
    first = runs.drop_duplicates("label")
    roles = {row.label: row.saved_by_role for row in first.itertuples() if isinstance(row.saved_by_role, Mapping)}
    layers = {row.label: row.saved_by_layer for row in first.itertuples() if isinstance(row.saved_by_layer, Mapping)}
    heaviest = dict(sorted(layers.items(), key=lambda item: -sum(item[1].values()))[:LAYER_ROWS])
    held = {row["method"]: {name: row[name] for name in PART_COLUMNS} for _, row in summary.iterrows()}
    held = {label: sizes for label, sizes in held.items() if not pd.isna(list(sizes.values())).any()}
    drawn = [
        ("Test accuracy against the measured peak", lambda path: accuracy_against_peak(summary, path)),
        ("What a step holds: weights, gradients, optimizer state and peak", lambda path: memory_by_part(held, path)),
        ("What autograd holds after a forward, by role", lambda path: memory_by_role(roles, path)),
        ("What autograd holds after a forward, by layer", lambda path: memory_by_layer(heaviest, path)),
    ]
    return [Figure(text, source) for text, draw in drawn if (source := _inlined(draw)) is not None]


def _inlined(draw: Callable[[Path], Path | None]) -> str | None:
    """Return a drawn figure as a data address; None where there was nothing to draw."""
    with tempfile.TemporaryDirectory() as folder:
        path = draw(Path(folder) / "figure.svg")
        if path is None:
            return None
        return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()


def _circumstances(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the machines and versions that the records come from, each once, with how many runs it made."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        around = record["circumstances"]
        versions = ", ".join(f"{name} {number}" for name, number in around.get("versions", {}).items() if number)
        row = {
            "device": around.get("device", ""),
            "cpu": around.get("cpu", ""),
            "cores": around.get("cores", ""),
            "threads": around.get("threads", ""),
            "versions": f"Python {around.get('python', '?')}, {versions}",
        }
        known = found.setdefault(repr(row), {**row, "runs": 0})
        known["runs"] += 1
    return list(found.values())
