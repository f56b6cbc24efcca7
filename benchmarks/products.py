"""A weight's gradient straight from the packed input beside the dense product with an unpacked copy, on the CPU.

    python benchmarks/products.py         # appends to benchmarks/results/products.csv

Layers of ResNet-50, MobileNetV2 and ViT-B/16, float32, as many samples as a chunk of a backward holds. Zeros where an
element was dropped; the rows "behind a ReLU" have a guess under a mask. Both ways take turns; a row holds the medians
and the quartiles of the ratio. Reading the packed form is in each time.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from unittest import mock

import torch
from _circumstances import append_rows, circumstances
from _malloc import keep_freed_memory
from _timing import quartiles, seconds
from torch import nn

from backrazor import RazorConfig, razor_
from backrazor.codecs import products

RESULTS = Path(__file__).parent / "results"
CONVS = {  # samples, C, size, D, kernel, stride, groups
    "resnet50 1, widening": (2, 64, 56, 256, 1, 1, 1),
    "resnet50 1, narrowing": (2, 256, 56, 64, 1, 1, 1),
    "resnet50 1, 3 x 3": (8, 64, 56, 64, 3, 1, 1),
    "resnet50 2, 3 x 3 strided": (4, 128, 56, 128, 3, 2, 1),
    "resnet50 2, shortcut": (2, 256, 56, 512, 1, 2, 1),
    "resnet50 3, widening": (8, 256, 14, 1024, 1, 1, 1),
    "resnet50 3, 3 x 3": (8, 256, 14, 256, 3, 1, 1),
    "resnet50 4, widening": (8, 512, 7, 2048, 1, 1, 1),
    "resnet50 4, 3 x 3": (8, 512, 7, 512, 3, 1, 1),
    "mobilenetv2, widening": (1, 16, 112, 96, 1, 1, 1),
    "mobilenetv2, narrowing": (2, 144, 56, 24, 1, 1, 1),
    "mobilenetv2, late": (8, 160, 7, 960, 1, 1, 1),
    "mobilenetv2, depthwise 112": (1, 32, 112, 32, 3, 1, 32),
    "mobilenetv2, depthwise 56": (2, 144, 56, 144, 3, 1, 144),
    "mobilenetv2, depthwise 14": (8, 384, 14, 384, 3, 1, 384),
    "mobilenetv2, depthwise 7": (8, 960, 7, 960, 3, 1, 960),
    "proxylessnas, 5 x 5 depthwise 28": (8, 128, 28, 128, 5, 1, 128),
    "proxylessnas, 5 x 5 depthwise 14": (8, 512, 14, 512, 5, 1, 512),
    "proxylessnas, 7 x 7 depthwise 7": (8, 1152, 7, 1152, 7, 1, 1152),
}
LINEARS = {"vit_b16, proj": (8, 768, 768), "vit_b16, fc2": (3, 3072, 768)}  # samples, I, O, of 197 tokens
ALWAYS = {"MOST_KEPT": 1.0, "FEWEST_TOKENS": 1, "FEWEST_SPARSE": 1}
NEVER = {"MOST_KEPT": 0.0}


def layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """(layer, shape of its input) by name."""
    found: dict[str, tuple[nn.Module, tuple[int, ...]]] = {}
    for name, (samples, inputs, size, outputs, kernel, stride, groups) in CONVS.items():
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        found[name] = conv, (samples, inputs, size, size)
    for name, (samples, inputs, outputs) in LINEARS.items():
        found[name] = nn.Linear(inputs, outputs, bias=False), (samples, 197, inputs)
    return found


def measure(
    layer: nn.Module, shape: tuple[int, ...], sparsity: float, threads: int, repeats: int, masked: bool
) -> dict:
    """The backward of the layer for its weight alone. ``masked``: behind a ReLU, whose bits say where guesses hold."""
    torch.set_num_threads(threads)
    model = nn.Sequential(nn.ReLU(), layer) if masked else nn.Sequential(layer)
    razor_(model, RazorConfig(sparsity, fill="known" if masked else "zero"))
    out = model(torch.randn(shape, requires_grad=masked))
    grad = torch.randn_like(out)

    def backward() -> None:
        torch.autograd.grad(out, layer.weight, grad, retain_graph=True)

    times: dict[str, list[float]] = {"packed": [], "dense": []}
    for turn in range(repeats + 1):
        for name, settings in (("packed", ALWAYS), ("dense", NEVER)):
            with mock.patch.multiple(products, **settings):
                took = seconds(backward)
            if turn:
                times[name].append(took)
    low, middle, high = quartiles([d / p for d, p in zip(times["dense"], times["packed"], strict=True)])
    return {
        "sparsity": sparsity,
        "threads": threads,
        "packed_ms": round(statistics.median(times["packed"]) * 1e3, 3),
        "dense_ms": round(statistics.median(times["dense"]) * 1e3, 3),
        "speedup_q1": round(low, 2),
        "speedup": round(middle, 2),
        "speedup_q3": round(high, 2),
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.7, 0.8, 0.9, 0.97])
    options = parser.parse_args()
    keep_freed_memory()
    rows = []
    for name, (layer, shape) in layers().items():
        masks = (False, True) if isinstance(layer, nn.Conv2d) and layer.groups == 1 else (False,)
        for sparsity in options.sparsities:
            for threads, masked in itertools.product((1, 2), masks):
                taken = measure(layer, shape, sparsity, threads, options.repeats, masked)
                label = f"{name}, behind a ReLU" if masked else name
                rows.append({"layer": label, "input": "x".join(map(str, shape)), **taken})
                print(rows[-1], flush=True)
    append_rows(RESULTS / "products.csv", rows, circumstances("python benchmarks/products.py"))


if __name__ == "__main__":
    main()
