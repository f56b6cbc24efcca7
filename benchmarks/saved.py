"""Bytes that a training step saves, predicted from shapes: six backbones, by preset and sparsity.

    python benchmarks/saved.py     # CPU, four minutes; writes benchmarks/results/saved.csv

Batch 8 (ViT-B/16: 16), 224 px, float32. The rows with a fill have ``values=int4, activation=auto``.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from _circumstances import circumstances
from torch import nn

import backrazor as br
from transfer.models.build import build_backbone

ROOT = Path(__file__).parents[1]
BACKBONES = {
    "proxylessnas": 8,
    "mobilenetv2": 8,
    "efficientnet_lite0": 8,
    "resnet18": 8,
    "resnet50": 8,
    "vit_b16": 16,
}
FILLED = {"values": "int4", "activation": "auto"}
PRESETS = {
    "compact": {},
    "compact, fill=mean": {"fill": "mean"} | FILLED,
    "compact, fill=known": {"fill": "known"} | FILLED,
}
SPARSITIES = (0.9, 0.97, 0.99)


def network(name: str) -> nn.Module:
    """The backbone with random weights, batch norm frozen."""
    config = {"name": name, "weights": None, "pretrained": False, "drop_rate": 0.0, "head_init": "uniform"}
    model = build_backbone(config, 10, ROOT / "pretrain").model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.requires_grad_(False)
    return model


def saved(model: nn.Module, batch: int) -> int:
    """Predicted bytes."""
    return br.memory.predict(model, (3, 224, 224), batch).saved_bytes


def main() -> None:
    """Predict, print, write."""
    torch.manual_seed(0)
    rows = []
    for name, batch in BACKBONES.items():
        model = network(name)
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
                "dense / known": dense.loc[wide.index] / wide["compact, fill=known"],
                "known / compact": wide["compact, fill=known"] / wide["compact"],
            }
        ).to_string(float_format="%.3f")
    )
    stamped = table.assign(**circumstances("python benchmarks/saved.py"))
    stamped.to_csv(ROOT / "benchmarks/results/saved.csv", index=False)


if __name__ == "__main__":
    main()
