"""How saved bytes and peak grow with the batch, and the largest batch that a fixed memory holds.

    python benchmarks/batches.py            # MobileNetV2 and ResNet-50: batch 1 to 64, and what fits into 2 GiB
    python benchmarks/batches.py --whole --backbones mobilenetv2 vit_b16    # what fits with weights and optimizer

Each point is measured in fresh processes (one file per point below outputs/batches; what exists is not measured again).
Slopes are least squares over all batches. The largest batch is searched by measuring: the batch given is the largest
found to fit, the next column the smallest found not to, at most ``TOLERANCE`` apart. Peaks need no idle machine.
With ``--whole`` the budget holds all of a step: weights, gradients, optimizer state, the input batch and the peak. The
compact rows of it free each gradient during backward; every row has SGD with momentum.
Written: results/batches.csv (points), results/batches_slopes.csv, results/batches_fits.csv; with ``--whole``
results/batches_whole.csv, a row as soon as it is known.
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
from _circumstances import append_rows, circumstances, command_line
from whole_process import Case

import backrazor as br
from backrazor.memory.processes import in_fresh_process
from razorlab.bench.measure import saved_of
from razorlab.bench.rows import Row, predictions
from razorlab.files import atomic_write_text

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 0.02
WHOLE = (0.9, 0.97, 0.99)  # sparsities
FIRST = (4, 8)  # batches, through whose needs the search draws its first line


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


def search(known: dict[int, float], budget: int, measure: Callable[[int], float]) -> tuple[int, int]:
    """The largest batch found to fit ``budget`` bytes, and the smallest found not to: both are measured, and put into
    ``known`` (batch -> bytes), which starts with two batches or more."""
    fits = max((b for b, size in known.items() if size <= budget), default=0)
    over = min((b for b, size in known.items() if size > budget), default=None)
    while over is None or over - fits > max(TOLERANCE * fits, 1):
        slope, start = numpy.polyfit(list(known), list(known.values()), 1)
        guess = int((budget - start) / slope)
        if over is not None and not fits < guess < over:  # the other side of the edge, then
            guess = fits + max(int(TOLERANCE * fits), 1) if guess <= fits else over - max(int(TOLERANCE * fits), 1)
        batch = max(guess, fits + 1)
        known[batch] = measure(batch)
        print(f"  batch {batch} takes {known[batch] / 1e6:.0f} MB", flush=True)
        if known[batch] <= budget:
            fits = max(fits, batch)
        else:
            over = batch if over is None else min(over, batch)
    return fits, over


def largest_batch(row: Row, budget: int, points: pandas.DataFrame, folder: Path) -> dict:
    """The largest batch whose measured peak is within ``budget`` bytes; both sides of the edge are measured."""
    part = points[(points["backbone"] == row.backbone) & (points["row"] == row.label)]
    peaks = {int(b): peak * 1e6 for b, peak in zip(part["batch"], part["peak_MB"], strict=True)}
    print(f"  {row.backbone} {row.label}", flush=True)
    fits, over = search(peaks, budget, lambda batch: peak_of(row, batch, folder))
    return {
        "backbone": row.backbone,
        "row": row.label,
        "budget_MB": budget / 1e6,
        "largest_batch": fits,
        "peak_MB": round(peaks[fits] / 1e6, 1) if fits else None,
        "too_large": over,
    }


def whole_rows(backbone: str) -> list[Case]:
    """Dense, its rival, and compact rows that free their gradients."""
    compact = [Row(backbone, f"compact {sparsity}, released", razor=("compact", sparsity)) for sparsity in WHOLE]
    rivals = [Row(backbone, "dense"), Row(backbone, "checkpointing by block", checkpointing="block")]
    return [Case(row) for row in rivals] + [Case(row, released=True) for row in compact]


def need_of(case: Case, batch: int, folder: Path) -> int:
    """Bytes of all of a step: its four parts and the input batch."""
    sized = replace(case, row=replace(case.row, batch=batch))
    images = batch * 3 * case.row.image**2 * 4

    def measured() -> int:
        return br.memory.measure_step(sized.build, repeats=1, what=("peak",)).total_bytes + images

    return _kept(folder / f"{_name(case.row)}-{batch}-need.json", measured)


def largest_whole(case: Case, budget: int, folder: Path) -> dict:
    """The largest batch whose step fits ``budget`` bytes whole."""
    print(f"  {case.row.backbone} {case.label}", flush=True)
    needs: dict[int, float] = {batch: need_of(case, batch, folder) for batch in FIRST}
    fits, over = search(needs, budget, lambda batch: need_of(case, batch, folder))
    found = {"largest_batch": fits, "takes_MB": round(needs[fits] / 1e6, 1) if fits else None, "too_large": over}
    return {"backbone": case.row.backbone, "row": case.label, "budget_MB": budget / 1e6, **found}


def whole(options: argparse.Namespace, common: dict[str, str]) -> None:
    """The rows that results/batches_whole.csv lacks."""
    file, budget = options.results / "batches_whole.csv", int(options.budget * 2**30)
    for case in [case for backbone in options.backbones for case in whole_rows(backbone)]:
        known = pandas.read_csv(file) if file.exists() else pandas.DataFrame(columns=["backbone", "row"])
        wanted = options.rows is None or case.label in options.rows
        if wanted and not ((known["backbone"] == case.row.backbone) & (known["row"] == case.label)).any():
            append_rows(file, [largest_whole(case, budget, options.folder)], common)
    if file.exists():
        print(pandas.read_csv(file)[["backbone", "row", "largest_batch", "takes_MB"]].to_markdown(index=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["mobilenetv2", "resnet50"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--budget", type=float, default=2.0, help="GiB above what is resident")
    parser.add_argument("--whole", action="store_true", help="the budget holds all of a step")
    parser.add_argument("--rows", nargs="+", help="with --whole: labels")
    parser.add_argument("--folder", type=Path, default=Path("outputs/batches"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    common = circumstances(command_line())
    if options.whole:
        whole(options, common)
        return
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
