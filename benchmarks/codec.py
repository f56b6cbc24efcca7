"""Packing and unpacking on the CPU beside the plain PyTorch pipeline: kthvalue, boolean indexing, scatter.

    python benchmarks/codec.py            # appends to benchmarks/results/codec.csv

Every repetition times all candidates in turn; the row holds medians and the ratio's quartiles over the repetitions.
``scaling`` rows hold nanoseconds per element over n and over the batch. glibc is told to keep freed memory: otherwise
outputs beyond its threshold pay the system for fresh pages, in every candidate (2 ns per element of ``clone()``).
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

import torch
from _circumstances import append_rows, circumstances
from _malloc import keep_freed_memory
from _timing import quartiles, seconds
from torch import Tensor

from backrazor.codecs import Pruned, kept_count, pack

RESULTS = Path(__file__).parent / "results"


def pipeline(x: Tensor, sparsity: float) -> Tensor:
    """Threshold by kthvalue, select by a boolean mask, store bfloat16, scatter back."""
    flat = x.flatten(1)
    rank = max(math.floor(flat.shape[1] * sparsity), 1)
    mask = flat.abs() >= flat.abs().kthvalue(rank, dim=1, keepdim=True).values
    values = flat[mask].to(torch.bfloat16)
    out = torch.zeros_like(flat)
    out[mask] = values.to(x.dtype)
    return out


def measure(
    shape: tuple[int, ...], sparsity: float, values: str, threads: int, repeats: int, rival: bool = True
) -> dict:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x = torch.randn(shape)
    if len(shape) == 4:
        x.relu_()
    codec, flag = Pruned(sparsity, values), torch.zeros(1, dtype=torch.int32)
    packed = pack(x, codec, flag)
    candidates = {
        "pack": lambda: pack(x, codec, flag),
        "unpack": lambda: packed.unpack(),
        "clone": lambda: x.clone(),
    }
    if rival:
        candidates["pipeline"] = lambda: pipeline(x, sparsity)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for function in candidates.values():
        function()
    for _ in range(repeats):
        for name, function in candidates.items():
            samples[name].append(seconds(function))
    per_element = {name: statistics.median(times) / x.numel() * 1e9 for name, times in samples.items()}
    both = [p + u for p, u in zip(samples["pack"], samples["unpack"], strict=True)]
    row = {
        "shape": "x".join(map(str, shape)),
        "kept": kept_count(x[0].numel(), sparsity),
        "sparsity": sparsity,
        "values": values,
        "threads": threads,
        "repeats": repeats,
        **{f"{name}_ns_per_element": round(value, 4) for name, value in per_element.items()},
        "ratio_to_clone": round(statistics.median(b / c for b, c in zip(both, samples["clone"], strict=True)), 2),
    }
    if rival:
        ratios = [r / b for r, b in zip(samples["pipeline"], both, strict=True)]
        names = ("speedup_q1", "speedup", "speedup_q3")
        row |= dict(zip(names, (round(q, 2) for q in quartiles(ratios)), strict=True))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    rows = []
    keep_freed_memory()
    for threads in (1, 2):
        for shape in ((8, 197, 3072), (8, 96, 112, 112)):
            for sparsity, values in ((0.9, "bfloat16"), (0.97, "bfloat16"), (0.9, "int8")):
                rows.append({"kind": "rival", **measure(shape, sparsity, values, threads, options.repeats)})
                print(rows[-1], flush=True)
    for shape in ((8, 10**4), (8, 10**5), (8, 10**6), (8, 10**7), (1, 10**6), (4, 10**6), (16, 10**6), (64, 10**6)):
        for threads in (1, 2):
            rows.append({"kind": "scaling", **measure(shape, 0.9, "bfloat16", threads, options.repeats, rival=False)})
            print(rows[-1], flush=True)
    append_rows(RESULTS / "codec.csv", rows, circumstances("python benchmarks/codec.py"))


if __name__ == "__main__":
    main()
