"""Measure dense training, its rivals and Back Razor on one CUDA device: saved bytes, allocator peak and time of a step.

    python -m razorlab bench-gpu          # ViT-B/16 at batch 128 in float32 and bfloat16, ProxylessNAS at batch 8
    python -m razorlab bench-gpu --quick  # the main rows, one process per figure

The columns are those of ``python -m razorlab bench``. The peak is torch.cuda.max_memory_allocated less what is
resident; the process column is that maximum itself; reserved_MB is torch.cuda.max_memory_reserved, which is what has to
fit a card. Results are kept by device, batch and commit. Every figure comes from a fresh process, after warm-up steps
in which kernels are compiled. The kernels' own tests on the device run first. A row that fails stops no other: the last
lines name what is missing and why, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from razorlab.bench.measure import SHOWN, Failures, measure_backbone, table_of, write
from razorlab.bench.missing import report
from razorlab.bench.rows import MAIN, Row, rows_of
from razorlab.errors import UserError

RUNS = (("vit_b16", "float32", 128), ("vit_b16", "bfloat16", 128), ("proxylessnas", "float32", 8))
GATE = "tests/kernels/test_gpu.py"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes per figure")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per process")
    parser.add_argument("--quick", action="store_true", help="four rows, one process of ten steps")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/benchmark_gpu"), help="where measurements are kept"
    )
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/steps_gpu.csv"))
    parser.add_argument("--skip-tests", action="store_true", help="do not run the kernels' tests first")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise UserError("no CUDA device: use `python -m razorlab bench` for the CPU")
    if options.quick:
        options.repeats, options.steps = 1, 10
    if not options.skip_tests:
        tests = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "not bar", GATE]
        if subprocess.run(tests).returncode != 0:
            print(
                "razorlab bench-gpu: the kernels' tests fail, so nothing was measured: mend them first", file=sys.stderr
            )
            return 1
    failed: Failures = {}
    measured: list[Row] = []
    for backbone, precision, batch in RUNS:
        rows = [row for row in rows_of(backbone, precision, "cuda", batch) if not options.quick or row.label in MAIN]
        measured += rows
        failed |= measure_backbone(rows, options.folder, options.repeats, options.steps)
        table = table_of(rows, options.folder)
        if table:
            shown = write(table, options.results, "python -m razorlab bench-gpu")[SHOWN]
            print(shown.to_markdown(index=False), flush=True)
    print(report(measured, options.folder, options.repeats, failed), flush=True)
    return 1 if failed else 0
