"""What guesses cost in time: a step of six backbones with the default beside one that reads zero for what is dropped.

    python benchmarks/fill_time.py     # CPU, two threads; writes benchmarks/results/fill_time.csv

Batch 8 (ViT-B/16: 16), 224 px, float32, random weights, batch norm frozen. All configurations of a backbone take turns
in one process. A row holds the median over the turns of a step's time, as a ratio to the dense step of that turn and
to the step with ``fill=zero`` at the same sparsity.
"""

from __future__ import annotations

import argparse
import statistics

import pandas as pd
import torch
from _backbones import ROOT, build, freeze
from _circumstances import append_rows, circumstances
from _malloc import keep_freed_memory
from _timing import seconds
from torch import nn
from torch.nn import functional as F

import backrazor as br
from razorlab.bench.rows import BATCH

BACKBONES = ("proxylessnas", "mobilenetv2", "efficientnet_lite0", "resnet18", "resnet50", "vit_b16")
ZERO = {"fill": "zero", "values": "int8", "activation": "int2"}
SPARSITIES = (0.9, 0.97, 0.99)


def network(name: str, config: br.RazorConfig | None) -> nn.Module:
    """The backbone, dense or razored."""
    torch.manual_seed(0)
    backbone = build(name, pretrained=False)
    freeze(backbone)
    if config is not None:
        br.razor_(backbone.model, config)
    return backbone.model


def measure(name: str, turns: int) -> list[dict[str, object]]:
    """One row per fill and sparsity."""
    configs = {("dense", 0.0): None}
    configs |= {("zero", s): br.RazorConfig(s, **ZERO) for s in SPARSITIES}
    configs |= {("known", s): br.RazorConfig(s) for s in SPARSITIES}
    models = {key: network(name, config) for key, config in configs.items()}
    batch = BATCH.get(name, 8)
    x = torch.randn(batch, 3, 224, 224)
    y = torch.arange(batch) % 10  # classes
    times: dict[tuple[str, float], list[float]] = {key: [] for key in models}
    for turn in range(turns + 1):
        for key, model in models.items():
            took = seconds(lambda model=model: F.cross_entropy(model(x), y).backward())
            model.zero_grad()
            if turn:  # the first of each is a warm-up
                times[key].append(took)

    def ratio(key: tuple[str, float], to: tuple[str, float]) -> float:
        return round(statistics.median(a / b for a, b in zip(times[key], times[to], strict=True)), 3)

    return [
        {"backbone": name, "fill": fill, "sparsity": s, "turns": turns}
        | {"time_to_dense": ratio((fill, s), ("dense", 0.0)), "time_to_zero": ratio((fill, s), ("zero", s))}
        for fill, s in models
        if fill != "dense"
    ]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=BACKBONES, choices=BACKBONES)
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    keep_freed_memory()
    told = {"threads": torch.get_num_threads(), **circumstances("python benchmarks/fill_time.py")}
    for name in options.backbones:
        rows = measure(name, options.turns)
        print(pd.DataFrame(rows).to_string(index=False), flush=True)
        append_rows(ROOT / "benchmarks/results/fill_time.csv", rows, told)  # each as soon as it is known


if __name__ == "__main__":
    main()
