"""Table 3: memory alone, no data: every backbone, sparsity and preset; predicted, saved, measured and official.

    python -m razorlab table3 --dry                     what it takes
    python -m razorlab table3                           all cells, then tables and figures
    python -m razorlab table3 --models resnet18 --preset smoke

Each cell is a json file of its own: interrupted, the same command goes on with the cells and figures that are missing.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pandas as pd
from tabulate import tabulate
from tqdm import tqdm

from razorlab.reproduction import duration
from razorlab.table3 import (
    BATCHES,
    MODELS,
    SMOKE,
    Cell,
    add_peak,
    grid,
    has_peak,
    load,
    predict_batches,
    without_peak,
)
from razorlab.tables import memory_curves, to_latex, wrap

NOTE = (
    "Training step with weights of random values, 100 classes, batch norm frozen, cross-entropy, Adam (ViT: SGD). "
    "MB = 1e6 bytes. Predicted: from shapes. Saved: what autograd holds after a forward. Measured peak: highest "
    "allocation of a step above weights, gradients and optimizer state, in a fresh process. Official formula: the "
    "released code's estimate at that sparsity. Reduction: peak of the dense network over this one's."
)
COLUMNS = {
    "model": "Model",
    "batch_size": "Batch",
    "preset": "Preset",
    "sparsity": "Sparsity",
    "official_mb": "Official formula, MB",
    "predicted_saved_mb": "Predicted saved, MB",
    "saved_mb": "Saved, MB",
    "predicted_peak_mb": "Predicted peak, MB",
    "peak_mb": "Measured peak, MB",
    "reduction": "Reduction of the peak",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help=f"comma-separated; default all of {','.join(MODELS)}")
    parser.add_argument("--preset", choices=("full", "smoke"), default="full", help="smoke: few cells, 96 px")
    parser.add_argument("--outputs", type=Path, help="folder; default outputs/table3, smoke outputs/smoke/table3")
    parser.add_argument("--no-peak", action="store_true", help="leave the measured peak for another time")
    parser.add_argument("--minutes", type=float, help="stop after about this long; the same command goes on")
    parser.add_argument("--dry", action="store_true", help="stop after saying what it takes")
    options = parser.parse_args(arguments)
    smoke = options.preset == "smoke"
    folder = options.outputs or Path("outputs") / ("smoke/table3" if smoke else "table3")
    planned = grid(options.models.split(",") if options.models else None, SMOKE if smoke else None)
    run(planned, folder, options)
    if not options.dry:
        write(planned, folder)
    return 0


def run(planned: list[Cell], folder: Path, options: argparse.Namespace) -> None:
    """Say what is missing, and run it cell by cell."""
    wanted = without_peak if options.no_peak else add_peak
    todo = [cell for cell in planned if load(cell, folder) is None or not (options.no_peak or has_peak(cell, folder))]
    print(f"table3, preset {options.preset}: needs no data and no weights; missing: nothing")
    print(f"cells: {len(planned)} ({len(planned) - len(todo)} finished, {len(todo)} to run)", flush=True)
    if not todo:
        return
    start = time.perf_counter()
    if not options.dry:
        wanted(todo[0], folder)
    else:
        without_peak(todo[0], folder / "probe", keep=False)
    seconds = time.perf_counter() - start
    print(f"estimate from one cell ({todo[0].name}): {duration(seconds * len(todo))}", flush=True)
    if options.dry:
        return
    for cell in tqdm(todo[1:], desc="table3", unit="cell"):
        if options.minutes and time.perf_counter() - start > 60 * options.minutes:
            print("razorlab table3: time is up; the same command goes on with what is missing", file=sys.stderr)
            break
        wanted(cell, folder)


def write(planned: list[Cell], folder: Path) -> None:
    """Write table.csv, table.md, table.tex and the figures of the cells that are there; print the table."""
    table = pd.DataFrame([{**cell.columns(), **(load(cell, folder) or {})} for cell in planned])
    for name in ("official", "predicted_saved", "saved", "predicted_peak", "peak"):
        key = f"{name}_bytes"
        table[f"{name}_mb"] = table[key].astype(float) * 1e-6 if key in table else float("nan")
    dense = table[table["preset"] == "dense"].set_index("model")["peak_mb"]
    table["reduction"] = table["model"].map(dense) / table["peak_mb"]
    shown = table.reindex(columns=list(COLUMNS))
    out = folder / "tables"
    out.mkdir(parents=True, exist_ok=True)
    shown.to_csv(out / "table.csv", index=False, float_format="%.6g")
    text = shown.rename(columns=COLUMNS).apply(lambda column: column.map(_text))
    markdown = text.to_markdown(index=False, disable_numparse=True)
    (out / "table.md").write_text(f"{markdown}\n\n{wrap(NOTE)}\n")
    (out / "table.tex").write_text(to_latex(text, NOTE))
    pruned = table[table["preset"] != "dense"]
    memory_curves(pruned, "sparsity", "sparsity", out / "memory_against_sparsity.png")
    batches = predict_batches(list(dict.fromkeys(table["model"])), planned[0].image_size, folder)
    memory_curves(batches, "batch_size", "batch size", out / "memory_against_batch.png")
    print(tabulate(text, headers="keys", showindex=False, disable_numparse=True))
    print(f"\nWritten to {out}; batch sizes of the second figure: {', '.join(map(str, BATCHES))} (predicted)")


def _text(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    if pd.isna(value):
        return "not measured"
    return f"{value:g}" if value < 1 else f"{value:.1f}"
