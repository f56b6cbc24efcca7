"""Measuring the rows of one backbone in turns, and the table that comes of it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pandas
import torch

import backrazor as br
from backrazor.memory.peak import in_fresh_process
from transfer.bench.rows import Row
from transfer.files import atomic_write_text
from transfer.records import circumstances

SHOWN = ["backbone", "row", "saved_MB", "saved_ratio", "peak_MB", "peak_ratio", "step_s", "time_ratio"]


def saved_of(row: Row, threads: int) -> int:
    torch.set_num_threads(threads)
    return row.saved_bytes()


def measure_backbone(rows: list[Row], folder: Path, repeats: int, steps: int) -> list[dict]:
    """One json file a row and round below ``folder``: what exists is not measured again."""
    threads = torch.get_num_threads()
    for round_ in range(repeats):
        for row in rows:
            file = _file(folder, row, round_)
            if file.exists():
                continue
            print(f"  round {round_ + 1}/{repeats}: {row.backbone} {row.precision} {row.label}", flush=True)
            measured = br.memory.measure_step(row.build, repeats=1, steps=steps)
            answer = {
                "backbone": row.backbone,
                "precision": row.precision,
                "label": row.label,
                "batch": row.images,
                "image": row.image,
                "peak_bytes": measured.peak_bytes,
                "process_bytes": measured.process_peak_bytes,
                "times": measured.time_samples,
            }
            if round_ == 0:
                answer["saved_bytes"] = in_fresh_process(saved_of, row, threads)
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(file, json.dumps(answer))
    return [summary(folder, row, rows[0], repeats) for row in rows]


def _file(folder: Path, row: Row, round_: int) -> Path:
    label = row.label.replace(" ", "_").replace(",", "")
    return folder / f"{row.backbone}-{row.precision}-{label}-{round_}.json"


def _read(folder: Path, row: Row, repeats: int) -> list[dict]:
    return [json.loads(_file(folder, row, round_).read_text()) for round_ in range(repeats)]


def summary(folder: Path, row: Row, dense: Row, repeats: int) -> dict:
    """One line of the table; ratios are dense / row for bytes and row / dense for time, round by round, their
    median."""
    rounds, base = _read(folder, row, repeats), _read(folder, dense, repeats)
    step = [statistics.median(sum(t) for t in r["times"]) for r in rounds]
    dense_step = [statistics.median(sum(t) for t in r["times"]) for r in base]
    ratios = [a / b for a, b in zip(step, dense_step, strict=True)]
    parts = [statistics.median(t[i] for r in rounds for t in r["times"]) for i in range(3)]
    peak = statistics.median(r["peak_bytes"] for r in rounds)
    return {
        "backbone": row.backbone,
        "precision": row.precision,
        "row": row.label,
        "batch": row.images,
        "saved_MB": round(rounds[0]["saved_bytes"] / 1e6, 2),
        "saved_ratio": round(base[0]["saved_bytes"] / max(rounds[0]["saved_bytes"], 1), 2),
        "peak_MB": round(peak / 1e6, 1),
        "peak_ratio": round(statistics.median(r["peak_bytes"] for r in base) / peak, 2),
        "process_MB": round(statistics.median(r["process_bytes"] for r in rounds) / 1e6, 1),
        "step_s": round(statistics.median(step), 4),
        "time_ratio": round(statistics.median(ratios), 3),
        "time_ratio_min": round(min(ratios), 3),
        "time_ratio_max": round(max(ratios), 3),
        "forward_s": round(parts[0], 4),
        "backward_s": round(parts[1], 4),
        "optimizer_s": round(parts[2], 4),
        "processes": repeats,
        "steps": len(rounds[0]["times"]),
    }


def append(table: list[dict], results: Path, command: str, device: str) -> None:
    """Append the lines of ``summary`` to a CSV file, stamped with the circumstances; show the main columns."""
    frame = pandas.DataFrame(table)
    common = circumstances(device, torch.get_num_threads())
    known = pandas.read_csv(results) if results.exists() else pandas.DataFrame()
    stamped = frame.assign(command=command, **{k: str(v) for k, v in common.items()})
    results.parent.mkdir(parents=True, exist_ok=True)
    pandas.concat([known, stamped]).to_csv(results, index=False)
    print(frame[SHOWN].to_markdown(index=False), flush=True)
