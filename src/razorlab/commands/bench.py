"""Measure dense training, its rivals and Back Razor on every backbone: saved bytes, peak and time of a step.

    python -m razorlab bench                               # all backbones and rows; goes on where it stopped
    python -m razorlab bench --backbones proxylessnas --quick        # the main rows of one backbone in minutes
    python -m razorlab bench --what peak                    # peaks alone, which need no idle machine

Every figure comes from a fresh process. Where time is measured, the processes of a backbone's rows take turns step by
step, and the table holds the median of the ratios to dense, turn by turn, with its spread over rounds. Operator tests
run first: a benchmark of wrong gradients is none. Written: the CSV file, the same as Markdown, and a figure of time
against peak for each backbone.

The main rows of all backbones come first, then the others, then those that torch.compile makes. A row that fails stops
no other. The last lines say what is missing, and the reason where it failed; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas

from razorlab.bench.measure import QUANTITIES, SHOWN, Failures, measure_backbone, table_of, write
from razorlab.bench.missing import report
from razorlab.bench.rows import MAIN, TURNS, Row, has_compiler, rows_of, turn_of
from razorlab.errors import UserError

BACKBONES = ("efficientnet_lite0", "mobilenetv2", "proxylessnas", "resnet18", "resnet50", "vit_b16")
NO_COMPILER = "razorlab bench: no C++ compiler (g++) for torch.compile: its rows are left out"
GATE = ("tests/backrazor/test_operators.py", "tests/backrazor/test_topk.py")


def operators_are_green() -> bool:
    """Whether the operator tests pass; their output goes to the terminal."""
    files = [name for name in GATE if Path(name).exists()]
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *files]).returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=BACKBONES, choices=BACKBONES)
    parser.add_argument("--precision", nargs="+", default=("float32",), choices=("float32", "bfloat16"))
    parser.add_argument("--rows", nargs="+", help=f"labels of rows to run; main: {', '.join(MAIN)}")
    parser.add_argument("--what", nargs="+", default=QUANTITIES, choices=QUANTITIES)
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes per figure")
    parser.add_argument("--steps", type=int, default=7, help="timed steps per process")
    parser.add_argument("--quick", action="store_true", help="the main rows, one process of five steps")
    parser.add_argument("--folder", type=Path, help="where measurements are kept (outputs/benchmark[-quick])")
    parser.add_argument("--results", type=Path, help="CSV (benchmarks/results/steps.csv; --quick: in the folder)")
    parser.add_argument("--skip-tests", action="store_true", help="do not run the operator tests first")
    options = parser.parse_args(arguments)
    options.folder = options.folder or Path("outputs/benchmark-quick" if options.quick else "outputs/benchmark")
    options.results = options.results or (
        options.folder / "steps.csv" if options.quick else Path("benchmarks/results/steps.csv")
    )
    if options.quick:
        options.repeats, options.steps, options.rows = 1, 5, options.rows or ["main"]
    if not options.skip_tests and not operators_are_green():
        print("razorlab bench: the operator tests fail, so nothing was measured: mend them first", file=sys.stderr)
        return 1
    if not has_compiler():
        print(NO_COMPILER, file=sys.stderr)
    wanted = options.rows and [label for name in options.rows for label in (MAIN if name == "main" else [name])]
    networks = [rows_of(backbone, precision) for backbone in options.backbones for precision in options.precision]
    chosen = [_chosen(every, wanted) for every in networks]
    failed: Failures = {}
    for turn in TURNS:
        for every, (dense, *others) in zip(networks, chosen, strict=True):
            rows = [dense, *(row for row in others if turn_of(row) == turn)]
            if turn != TURNS[0] and rows == [dense]:
                continue
            failed |= measure_backbone(rows, options.folder, options.repeats, options.steps, options.what)
            table = table_of(every, options.folder)
            if table:
                write(table, options.results, "python -m razorlab bench")
                print(pandas.DataFrame(table)[SHOWN].to_markdown(index=False), flush=True)
    print(report([row for rows in chosen for row in rows], options.folder, options.repeats, failed), flush=True)
    if not has_compiler():
        print(NO_COMPILER, file=sys.stderr)
    return 1 if failed else 0


def _chosen(every: list[Row], wanted: Sequence[str] | None) -> list[Row]:
    """Dense, and of the others those that are ``wanted``; all of them for None.

    Raises:
        UserError: there is no row of that label.
    """
    unknown = set(wanted or ()) - {row.label for row in every}
    if unknown:
        labels = ", ".join(repr(row.label) for row in every)
        raise UserError(f"--rows {sorted(unknown)} not known for {every[0].backbone}: use {labels}")
    return [row for row in every if wanted is None or row.label == "dense" or row.label in wanted]
