"""GELU and LayerNorm forward by the library's rules beside PyTorch's own forward.

    python benchmarks/activations.py --threads 1        # appends to benchmarks/results/activations.csv

``forward`` is what a training step runs: the operator itself and what it keeps (under grad mode, for an input that
needs a gradient); ``plain`` is F.gelu or F.layer_norm alone, without grad mode; ``encode`` the kernel that makes the
codes. The candidates of a case take turns; times are medians in milliseconds, ratios medians of the ratios turn by
turn with their quartiles.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from _circumstances import append_rows, circumstances, command_line
from _timing import quartiles, seconds
from torch import Tensor
from torch.nn import functional as F

from backrazor import functional
from backrazor.codecs import NormCodec
from backrazor.codecs.smooth import quantiser
from backrazor.kernels import level_encode

RESULTS = Path(__file__).parent / "results" / "activations.csv"
SHAPES = {"gelu": (8, 197, 3072), "layer_norm": (16, 197, 768)}  # of ViT-B/16: inside the MLP; a block's tokens


def gelu_cases(x: Tensor, rule: str) -> dict[str, Callable[[], object]]:
    bits, flag = int(rule.removeprefix("int")), torch.zeros(1, dtype=torch.int32)
    thresholds, _ = quantiser("gelu", bits)
    rows, leaf = x.view(x.shape[0], -1), x.detach().requires_grad_()
    return {
        "plain": lambda: F.gelu(x),
        "forward": lambda: functional.smooth(leaf, "gelu", rule, flag),
        "encode": lambda: level_encode(rows, thresholds, bits),
    }


def norm_cases(x: Tensor, rule: str) -> dict[str, Callable[[], object]]:
    weight, bias = torch.ones(x.shape[-1]), torch.zeros(x.shape[-1])
    leaf, flag = x.detach().requires_grad_(), torch.zeros(1, dtype=torch.int32)
    shape, codec = (x.shape[-1],), NormCodec(rule)
    return {
        "plain": lambda: F.layer_norm(x, shape, weight, bias),
        "forward": lambda: functional.layer_norm(leaf, shape, weight, bias, 1e-6, codec, flag),
    }


CASES = {"gelu": (gelu_cases, ("int2", "int4", "int8")), "layer_norm": (norm_cases, ("int4", "int8"))}


def measure(operator: str, rule: str, threads: int, repeats: int) -> dict[str, object]:
    """One row."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    make, _ = CASES[operator]
    candidates = make(torch.randn(SHAPES[operator]), rule)
    for _ in range(3):  # compiles, and settles the clock
        for function in candidates.values():
            function()
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, function in candidates.items():
            samples[name].append(seconds(function))
    ratios = [f / p for f, p in zip(samples["forward"], samples["plain"], strict=True)]
    return {
        "operator": operator,
        "rule": rule,
        "shape": "x".join(map(str, SHAPES[operator])),
        "threads": threads,
        "repeats": repeats,
        **{f"{name}_ms": round(1e3 * statistics.median(times), 3) for name, times in samples.items()},
        **dict(zip(("ratio_q1", "ratio", "ratio_q3"), (round(q, 3) for q in quartiles(ratios)), strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    rows = []
    for threads in options.threads:
        for operator, (_, rules) in CASES.items():
            for rule in rules:
                rows.append({"encode_ms": "", **measure(operator, rule, threads, options.repeats)})
                print(rows[-1], flush=True)
    append_rows(RESULTS, rows, circumstances(command_line()))


if __name__ == "__main__":
    main()
