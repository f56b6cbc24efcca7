"""Two choices behind a step's time: how much of a dense copy backward holds at once, and whether the C library keeps
freed memory; and how steady the machine itself is.

    python benchmarks/choices.py            # appends to benchmarks/results/choices.csv

Every variant is a fresh process; they take turns step by step with a dense one, and the ratio is the median over turns.
``steadiness`` rows time one PyTorch operator alone, twenty calls per point over half a minute: what they spread is the
machine's, not ours.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from pathlib import Path

import torch
from _circumstances import append_rows, circumstances, command_line
from _malloc import keep_freed_memory
from _timing import quartiles, seconds

import backrazor as br
from backrazor.functional import common
from razorlab.bench.rows import Row

RESULTS = Path(__file__).parent / "results" / "choices.csv"


def build(row: Row, chunk_mib: int | None, keep: bool) -> br.memory.Step:
    """The step of ``row`` under these choices, in the process that runs it."""
    if keep:
        keep_freed_memory()
    if chunk_mib is not None:
        common.CHUNK_BYTES = chunk_mib << 20
    return row.build()


def variants(backbone: str, sparsity: float, chunks: list[int]) -> dict[str, functools.partial]:
    dense, razored = Row(backbone, "dense"), Row(backbone, "compact", razor=("compact", sparsity))
    return {
        "dense": functools.partial(build, dense, None, False),
        "dense, memory kept": functools.partial(build, dense, None, True),
        f"compact {sparsity}, memory kept": functools.partial(build, razored, None, True),
        **{f"compact {sparsity}, chunks of {mib} MiB": functools.partial(build, razored, mib, False) for mib in chunks},
    }


def steadiness(points: int) -> list[dict]:
    """Milliseconds of a lone operator: smallest, median and largest of ``points`` medians."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(8, 1152, 7, 7, generator=generator), torch.randn(1152, 1, 7, 7, generator=generator)
    flat = torch.randn(200_000, generator=generator)
    operators = {
        "depthwise convolution backward": lambda: torch.ops.aten.convolution_backward(
            x, x, weight, None, [1, 1], [3, 3], [1, 1], False, [0, 0], 1152, [True, True, False]
        ),
        "exp": lambda: torch.exp(flat),
    }
    medians: dict[str, list[float]] = {name: [] for name in operators}
    for _ in range(points):
        for name, operator in operators.items():
            medians[name].append(1e3 * statistics.median(seconds(operator) for _ in range(20)))
        time.sleep(0.3)
    return [
        {
            "kind": "steadiness",
            "variant": name,
            "ms_min": round(min(m), 3),
            "ms": round(statistics.median(m), 3),
            "ms_max": round(max(m), 3),
        }
        for name, m in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["resnet50", "proxylessnas"])
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--chunks", type=int, nargs="+", default=[2, 4, 8, 16], help="MiB")
    parser.add_argument("--steps", type=int, default=7)
    options = parser.parse_args()
    empty = dict.fromkeys(("backbone", "step_s", "ratio_q1", "ratio", "ratio_q3", "ms_min", "ms", "ms_max"), "")
    rows = [empty | row for row in steadiness(30)]
    for backbone in options.backbones:
        factories = variants(backbone, options.sparsity, options.chunks)
        measured = br.memory.measure_steps(factories, repeats=1, steps=options.steps, what=("time",))
        for name, result in measured.items():
            ratios = [a / b for a, b in zip(result.step_samples, measured["dense"].step_samples, strict=True)]
            line = {"kind": "step", "backbone": backbone, "variant": name, "step_s": round(result.step_seconds, 4)}
            line |= dict(zip(("ratio_q1", "ratio", "ratio_q3"), (round(q, 3) for q in quartiles(ratios)), strict=True))
            rows.append(empty | line)
            print(line, flush=True)
    append_rows(RESULTS, rows, circumstances(command_line()))


if __name__ == "__main__":
    main()
