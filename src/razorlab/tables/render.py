"""A summary as CSV, Markdown, LaTeX and text for the terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

WIDTH = 100  # characters of a line, as in every page
NOT_RUN = "not run"
NOT_MEASURED = "not measured"
HEADINGS = {
    "accuracy": ("Test accuracy, %", 2),
    "mean_iou": ("Mean IoU, %", 2),
    "saved_mb": ("Saved, MB", 1),
    "peak_mb": ("Peak, MB", 1),
    "step_s": ("Step, s", 3),
}
PARTS = {
    "weights_mb": ("Weights", 1),
    "gradients_mb": ("Gradients", 1),
    "optimizer_mb": ("Optimizer", 1),
    "peak_mb": ("Peak", 1),
    "total_mb": ("In all", 1),
}


def wrap(text: str) -> str:
    """``text`` in lines of at most ``WIDTH`` characters, none of which breaks a span of code."""
    whole = re.sub(r"`[^`]*`", lambda span: span.group().replace(" ", "\0"), text)
    return textwrap.fill(whole, WIDTH, break_long_words=False, break_on_hyphens=False).replace("\0", " ")


def parts(summary: pd.DataFrame) -> pd.DataFrame | None:
    """Return what a whole step holds as text, as ``cells``: the four parts and their sum, its ratio alone in brackets.

    None where no run was measured with its parts.
    """
    if not summary["total_mb"].notna().any():
        return None
    alone = {f"{name}_{what}": float("nan") for name in PARTS for what in ("std", "ratio") if name != "total_mb"}
    return cells(summary.assign(**alone), PARTS).rename(columns={"Method": "A step holds, MB"})


def cells(summary: pd.DataFrame, headings: Mapping[str, tuple[str, int]] = HEADINGS) -> pd.DataFrame:
    """Return the summary as text: value, spread where there are several seeds, ratio to the dense row in brackets.

    A row that was not run says so, and so does a figure that was not measured.
    """
    if "mean_iou" not in summary:  # a class per image
        headings = {name: heading for name, heading in headings.items() if name != "mean_iou"}
    rows = []
    for _, row in summary.iterrows():
        shown = {"Method": row["method"]}
        for name, (heading, digits) in headings.items():
            shown[heading] = _cell(row, name, digits)
        rows.append(shown)
    return pd.DataFrame(rows)


def _cell(row: pd.Series, name: str, digits: int) -> str:
    if row["seeds"] == 0:
        return NOT_RUN
    if pd.isna(row[name]):
        return NOT_MEASURED
    text = f"{row[name]:.{digits}f}"
    if not pd.isna(row[f"{name}_std"]):
        text += f" ± {row[f'{name}_std']:.{digits}f}"
    return text if pd.isna(row[f"{name}_ratio"]) else f"{text} ({row[f'{name}_ratio']:.3g}x)"


def to_terminal(summary: pd.DataFrame) -> str:
    """Return the tables as text of at most 100 columns for one seed per row: the results, then what a step holds."""
    return "\n\n".join(
        text.to_markdown(index=False, tablefmt="simple", disable_numparse=True) for text in _both(summary)
    )


def _both(summary: pd.DataFrame) -> list[pd.DataFrame]:
    return [text for text in (cells(summary), parts(summary)) if text is not None]


def caption(runs: pd.DataFrame) -> str:
    """Say what the figures of a table are, in one sentence."""
    shapes = runs[["measured_batch", "measured_size"]].dropna().drop_duplicates().astype(int)
    unit = "tokens" if runs["task"].eq("text").all() else "px"
    where = " and ".join(f"batch {batch}, {size} {unit}" for batch, size in shapes.itertuples(index=False))
    subject = f"{', '.join(sorted(set(runs['model'])))} on {', '.join(sorted(set(runs['data'])))}"
    images = [int(count) for count in runs["test_images"].dropna().unique()]
    if len(images) == 1:
        what = "texts" if unit == "tokens" else "images"
        subject += f", {images[0]} test {what}, of which one is {100 / images[0]:.2g} points of accuracy"
    seeds = runs["seed"].nunique()
    subject += f"; mean and sample deviation over {seeds} seeds" if seeds > 1 else "; one seed"
    return (
        f"{subject}; saved: bytes that autograd holds after a forward; peak: highest allocation of a step above "
        f"weights, gradients and optimizer state; both and the step's time for {where or 'no measured step'}; in all: "
        "the sum of these four; in brackets the ratio to the dense row; MB = 1e6 bytes."
    )


def write_tables(summary: pd.DataFrame, runs: pd.DataFrame, folder: Path) -> list[Path]:
    """Write ``table.csv`` (plain numbers and a status), ``table.md`` and ``table.tex`` (booktabs); return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = summary.assign(status=["run" if seeds else NOT_RUN for seeds in summary["seeds"]])
    paths = [folder / f"table.{ending}" for ending in ("csv", "md", "tex")]
    numbers.to_csv(paths[0], index=False, float_format="%.6g")
    tables = _both(summary)
    markdown = "\n\n".join(text.to_markdown(index=False, disable_numparse=True) for text in tables)
    paths[1].write_text(f"{markdown}\n\n{wrap(caption(runs))}\n", encoding="utf-8")
    paths[2].write_text("\n".join(_latex(text, caption(runs)) for text in tables), encoding="utf-8")
    return paths


def _latex(text: pd.DataFrame, words: str) -> str:
    """One booktabs table."""
    escaped = text.map(lambda cell: cell.replace("±", r"$\pm$").replace("_", r"\_").replace("%", r"\%"))
    escaped.columns = [heading.replace("%", r"\%") for heading in escaped.columns]
    columns = "l" + "r" * (len(text.columns) - 1)
    return escaped.to_latex(index=False, caption=words.replace("_", r"\_"), column_format=columns)
