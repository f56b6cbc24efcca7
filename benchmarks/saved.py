"""Bytes that a training step saves, predicted from shapes: six backbones, by preset and sparsity.

    python benchmarks/saved.py     # CPU, four minutes; writes benchmarks/results/saved.csv

Batch 8 (ViT-B/16: 16), 224 px, float32. *compact* is the default, ``fill=known``. *fill=zero* has
``values=int8, activation=int2``, which was the default before.
"""

from __future__ import annotations

import pandas as pd
import torch
from _backbones import ROOT, build, freeze
from _circumstances import circumstances
from torch import nn

import backrazor as br
from razorlab.bench.rows import BATCH

BACKBONES = ("proxylessnas", "mobilenetv2", "efficientnet_lite0", "resnet18", "resnet50", "vit_b16")
PRESETS = {
    "compact": {},
    "fill=mean": {"fill": "mean"},
    "fill=zero": {"fill": "zero", "values": "int8", "activation": "int2"},
}
SPARSITIES = (0.9, 0.97, 0.99)


def network(name: str) -> nn.Module:
    """The backbone with random weights, batch norm frozen."""
    backbone = build(name, pretrained=False)
    freeze(backbone)
    return backbone.model


def saved(model: nn.Module, batch: int) -> int:
    """Predicted bytes."""
    return br.memory.predict(model, (3, 224, 224), batch).saved_bytes


def main() -> None:
    """Predict, print, write."""
    torch.manual_seed(0)
    rows = []
    for name in BACKBONES:
        model, batch = network(name), BATCH.get(name, 8)
        dense = saved(model, batch)
        for sparsity in SPARSITIES:
            for preset, changes in PRESETS.items():
                br.razor_(model, br.RazorConfig(sparsity, **changes))
                rows.append(
                    {"backbone": name, "sparsity": sparsity, "preset": preset, "saved_bytes": saved(model, batch)}
                )
                br.unrazor_(model)
                rows[-1]["dense_bytes"] = dense
    table = pd.DataFrame(rows)
    wide = table.pivot(index=["backbone", "sparsity"], columns="preset", values="saved_bytes").loc[list(BACKBONES)]
    dense = table.groupby(["backbone", "sparsity"]).dense_bytes.first()
    print(
        pd.DataFrame(
            {
                "compact, MB": wide["compact"] / 1e6,
                "dense / compact": dense.loc[wide.index] / wide["compact"],
                "compact / zero": wide["compact"] / wide["fill=zero"],
            }
        ).to_string(float_format="%.3f")
    )
    stamped = table.assign(**circumstances("python benchmarks/saved.py"))
    stamped.to_csv(ROOT / "benchmarks/results/saved.csv", index=False)


if __name__ == "__main__":
    main()
