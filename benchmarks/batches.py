"""How saved bytes and peak grow with the batch, and the largest batch that a fixed memory holds.

    python benchmarks/batches.py            # MobileNetV2 and ResNet-50: batch 1 to 64, and what fits into 2 GiB

Each point is measured in fresh processes (one file per point below outputs/batches; what exists is not measured again).
Slopes are least squares over all batches. The largest batch is searched by measuring: the batch given is the largest
found to fit, the next column the smallest found not to, at most ``TOLERANCE`` apart. Peaks need no idle machine.
Written: results/batches.csv (points), results/batches_slopes.csv, results/batches_fits.csv.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy
import pandas
import torch
from _circumstances import circumstances, command_line

import backrazor as br
from backrazor.memory.processes import in_fresh_process
from transfer.bench.measure import saved_of
from transfer.bench.rows import Row, predictions
from transfer.files import atomic_write_text

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 0.02


def rows_of(backbone: str) -> list[Row]:
    return [
        Row(backbone, "dense"),
        Row(backbone, "checkpointing by block", checkpointing="block"),
        Row(backbone, "compact 0.9", razor=("compact", 0.9)),
        Row(backbone, "compact 0.97", razor=("compact", 0.97)),
    ]


def _kept(file: Path, measure: Callable[[], int]) -> int:
    """What ``file`` holds, or what ``measure`` returns, which then lies there with its circumstances."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, json.dumps({"bytes": measure(), **circumstances(command_line())}))
    return json.loads(file.read_text())["bytes"]


def _name(row: Row) -> str:
    return f"{row.backbone}-{row.label.replace(' ', '_')}"


def peak_of(row: Row, batch: int, folder: Path) -> int:
    build = replace(row, batch=batch).build
    return _kept(
        folder / f"{_name(row)}-{batch}-peak.json",
        lambda: br.memory.measure_step(build, repeats=1, what=("peak",)).peak_bytes,
    )


def point(row: Row, batch: int, predicted: br.memory.Prediction, folder: Path) -> dict:
    """One row of the table of points; MB."""
    threads = torch.get_num_threads()
    saved = _kept(
        folder / f"{_name(row)}-{batch}-saved.json",
        lambda: in_fresh_process(saved_of, replace(row, batch=batch), threads),
    )
    peak = peak_of(row, batch, folder)
    return {
        "backbone": row.backbone,
        "row": row.label,
        "batch": batch,
        "saved_MB": saved / 1e6,
        "predicted_saved_MB": predicted.saved_bytes / 1e6,
        "peak_MB": peak / 1e6,
        "predicted_peak_MB": predicted.peak_bytes / 1e6,
    }


def slopes(points: pandas.DataFrame) -> pandas.DataFrame:
    """MB per image by least squares, measured and predicted, and the ratios of dense to the row."""
    lines = []
    for (backbone, label), part in points.groupby(["backbone", "row"], sort=False):
        line = {"backbone": backbone, "row": label}
        for column in ("saved_MB", "predicted_saved_MB", "peak_MB", "predicted_peak_MB"):
            slope, start = numpy.polyfit(part["batch"], part[column], 1)
            line[f"{column}_an_image"] = slope
            if column in ("saved_MB", "peak_MB"):
                off = (part[column] - (slope * part["batch"] + start)).abs().max()
                line[f"{column}_off_the_line"] = off / part[column].max()
        lines.append(line)
    table = pandas.DataFrame(lines)
    for quantity in ("saved", "peak"):
        for kind in ("", "predicted_"):
            column = f"{kind}{quantity}_MB_an_image"
            dense = table["backbone"].map(table[table["row"] == "dense"].set_index("backbone")[column])
            table[f"{kind}{quantity}_ratio"] = dense / table[column]
        table[f"{quantity}_ratio_off"] = table[f"{quantity}_ratio"] / table[f"predicted_{quantity}_ratio"] - 1
    return table.round(4)


def largest_batch(row: Row, budget: int, points: pandas.DataFrame, folder: Path) -> dict:
    """The largest batch whose measured peak is within ``budget`` bytes; both sides of the edge are measured."""
    part = points[(points["backbone"] == row.backbone) & (points["row"] == row.label)]
    peaks = {int(b): peak * 1e6 for b, peak in zip(part["batch"], part["peak_MB"], strict=True)}
    fits = max((b for b, peak in peaks.items() if peak <= budget), default=0)
    over = min((b for b, peak in peaks.items() if peak > budget), default=None)
    while over is None or over - fits > max(TOLERANCE * fits, 1):
        slope, start = numpy.polyfit(list(peaks), list(peaks.values()), 1)
        guess = int((budget - start) / slope)
        if over is not None and not fits < guess < over:  # the other side of the edge, then
            guess = fits + max(int(TOLERANCE * fits), 1) if guess <= fits else over - max(int(TOLERANCE * fits), 1)
        batch = max(guess, fits + 1)
        peaks[batch] = peak_of(row, batch, folder)
        print(f"  {row.backbone} {row.label}: batch {batch} peaks at {peaks[batch] / 1e6:.0f} MB", flush=True)
        if peaks[batch] <= budget:
            fits = max(fits, batch)
        else:
            over = batch if over is None else min(over, batch)
    return {
        "backbone": row.backbone,
        "row": row.label,
        "budget_MB": budget / 1e6,
        "largest_batch": fits,
        "peak_MB": round(peaks[fits] / 1e6, 1) if fits else None,
        "too_large": over,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["mobilenetv2", "resnet50"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--budget", type=float, default=2.0, help="GiB above what is resident")
    parser.add_argument("--folder", type=Path, default=Path("outputs/batches"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    common = circumstances(command_line())
    rows = [row for backbone in options.backbones for row in rows_of(backbone)]
    points = []
    for row in rows:
        for batch, predicted in zip(options.batches, predictions(row, options.batches), strict=True):
            points.append(point(row, batch, predicted, options.folder))
            print({key: round(v, 1) if isinstance(v, float) else v for key, v in points[-1].items()}, flush=True)
    frame = pandas.DataFrame(points)
    frame.round(3).assign(**common).to_csv(options.results / "batches.csv", index=False)
    table = slopes(frame)
    table.assign(**common).to_csv(options.results / "batches_slopes.csv", index=False)
    print(table.to_markdown(index=False))
    fits = pandas.DataFrame([largest_batch(row, int(options.budget * 2**30), frame, options.folder) for row in rows])
    fits.assign(**common).to_csv(options.results / "batches_fits.csv", index=False)
    print(fits.to_markdown(index=False))


if __name__ == "__main__":
    main()
