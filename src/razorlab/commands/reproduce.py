"""Run a table (1, 2, or one on embedded data): say what it needs, run cells without a record, write tables.

    python -m razorlab reproduce table1 --dry                what it needs, what is missing, how long it takes
    python -m razorlab reproduce table1 --data pets --seeds 0
    python -m razorlab reproduce table2 --preset smoke       the same on embedded digits, in minutes
    python -m razorlab reproduce digits                      every method on few digits; peak: razorlab measure
    python -m razorlab reproduce ablation                    what is pruned, how it is chosen, what stands for the rest
    python -m razorlab reproduce segmentation --preset smoke DeepLabV3 on embedded scenes; without it VOC and Pets

Interrupted, the same command goes on with what is missing. Further arguments (key=value) go to train.py.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pandas as pd
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from razorlab.composition import compose_config
from razorlab.errors import UserError, one_line
from razorlab.experiments import DIGITS_TABLES, REAL_DATA, SMOKE_DATA, TABLES, experiments
from razorlab.recipes import SMOKE_DATA as DIGITS
from razorlab.recipes import Recipe
from razorlab.released import DATA
from razorlab.reproduction import Cell, duration, estimated_seconds, missing_inputs, needs
from razorlab.settings import validate
from razorlab.tables import accuracy_against_peak, cells, load_runs, memory_by_role, pivot, title, write_grid


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--preset", choices=("full", "smoke"), default="full", help="smoke: embedded data")
    parser.add_argument("--data", help="data sets of the table, comma-separated; default all")
    parser.add_argument("--seeds", default=None, help="comma-separated; default 0,1,2, smoke 0")
    parser.add_argument("--outputs", type=Path, help="folder of the runs; default outputs, smoke outputs/smoke")
    parser.add_argument("--launcher", choices=("basic", "joblib", "submitit_local", "submitit_slurm"), default="basic")
    parser.add_argument("--dry", action="store_true", help="stop after saying what it takes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run, as train.py takes them")
    return parser.parse_intermixed_args(arguments)


def wanted(options: argparse.Namespace) -> list[Recipe]:
    """Return the recipes that the command line asks for.

    Raises:
        UserError: an unknown data set.
    """
    real, embedded = REAL_DATA.get(options.table, DATA), SMOKE_DATA.get(options.table, DIGITS)
    if options.preset == "smoke" or options.table in DIGITS_TABLES:
        names: tuple[str, ...] = (embedded,)
    else:
        names = tuple(options.data.split(",")) if options.data else real
    unknown = [name for name in names if name not in (*real, embedded)]
    if unknown:
        raise UserError.value("--data", unknown[0], "|".join(real))
    return [recipe for recipe in experiments(options.table) if recipe.data in names]


def seeds_of(options: argparse.Namespace) -> list[int]:
    """Return the seeds.

    Raises:
        UserError: not a list of whole numbers.
    """
    text = options.seeds or ("0" if options.preset == "smoke" else "0,1,2")
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError.value("--seeds", text, "whole numbers, comma-separated, such as 0,1,2") from error


def compose_cells(chosen: list[Recipe], seeds: list[int], overrides: list[str]) -> list[Cell]:
    """Compose every recipe with every seed, as train.py would.

    Raises:
        UserError: an override is refused.
    """
    found = []
    for recipe in chosen:
        try:
            composed = compose_config([f"experiment={recipe.name}", *overrides])
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(f"{' '.join(overrides)}: {one_line(error)}") from error
        config = validate(composed)
        found += [Cell(recipe, {**config, "seed": seed}) for seed in seeds]
    return found


def sweep(todo: list[Cell], overrides: list[str], launcher: str) -> int:
    """Run ``todo`` as one Hydra sweep and return its exit code. A run that is finished is not run again."""
    names = dict.fromkeys(cell.recipe.name for cell in todo)
    seeds = dict.fromkeys(str(cell.config["seed"]) for cell in todo)
    command = [sys.executable, "-m", "razorlab", "train", "-m"]
    command += [f"experiment={','.join(names)}", f"seed={','.join(seeds)}"]
    command += overrides if launcher == "basic" else [f"hydra/launcher={launcher}", *overrides]
    return subprocess.run(command, check=False).returncode


def write(table: str, chosen: list[Recipe], outputs: Path) -> None:
    """Write tables and figures of ``chosen`` below ``outputs/<table>/tables`` and print the table."""
    folder = outputs / table
    runs = load_runs(folder) if folder.is_dir() and any(folder.rglob("record.json")) else pd.DataFrame()
    names = {recipe.name for recipe in chosen}
    runs = runs[runs["newest"] & runs["experiment"].isin(names)] if len(runs) else runs
    grid = cells(runs, chosen)
    heading = title(table, runs)
    written: list[Path | None] = [*write_grid(grid, runs, folder / "tables", heading)]
    for data, group in grid.groupby("data", sort=False):
        written.append(accuracy_against_peak(group, folder / "tables" / f"accuracy_against_peak_{data}.png"))
        labels = group.set_index("experiment")["method"]
        of_data = (
            runs[runs["experiment"].isin(group["experiment"])].drop_duplicates("experiment") if len(runs) else runs
        )
        roles = {labels[row.experiment]: row.saved_by_role for row in of_data.itertuples() if row.saved_by_role}
        ordered = {label: roles[label] for label in labels if label in roles}
        written.append(memory_by_role(ordered, folder / "tables" / f"memory_by_role_{data}.png"))
    print(f"\n{heading}\n")
    print(pivot(grid).to_markdown(index=False, disable_numparse=True))
    print(f"\nWritten: {', '.join(str(path) for path in written if path)}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = parse(arguments)
    outputs = options.outputs or Path("outputs") / ("smoke" if options.preset == "smoke" else "")
    overrides = [f"paths.outputs={outputs}", *options.overrides]
    chosen = wanted(options)
    planned = compose_cells(chosen, seeds_of(options), overrides)
    todo = [cell for cell in planned if not cell.finished]
    missing = missing_inputs(todo)
    print(f"{options.table}, preset {options.preset}: needs {needs(planned)}")
    print("\n".join(f"missing: {line}" for line in missing) or "missing: nothing")
    print(f"cells: {len(planned)} ({len(planned) - len(todo)} finished, {len(todo)} to run)", flush=True)
    if todo:
        rows = len({cell.recipe.row.name for cell in todo})
        print(f"timing a few steps of {rows} rows for an estimate", flush=True)
        seconds = estimated_seconds(todo)
        print(f"estimate from a few timed steps of each row on this machine: {duration(seconds)}, one after the other")
    if options.dry:
        return 0
    if missing:
        raise UserError("the files above are missing: get them with the commands beside them, or choose with --data")
    sys.stdout.flush()
    code = sweep(todo, overrides, options.launcher) if todo else 0
    write(options.table, chosen, outputs)
    return code
