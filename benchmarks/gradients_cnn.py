"""Cosine of the gradient to the dense one, for convolutional networks a little way into fine-tuning on digits.

    python benchmarks/gradients_cnn.py     # CPU; writes benchmarks/results/gradients_cnn.csv

EfficientNet-Lite0 starts from its ImageNet weights and sees 25 steps at 160 px, with batch norm frozen. The others have
no weights in a package: they start at random and see 60 steps at 96 px. Then batch norm is frozen, and the gradients of
three batches of the training images are compared.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator

import pandas as pd
import torch
from _backbones import ROOT, build, freeze
from _circumstances import circumstances
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import backrazor as br

WEIGHTS = ROOT / "outputs/gradients"
SPARSITIES = (0.9, 0.97, 0.99)
BATCH, BATCHES = 16, 3
MEAN, STD = 0.3, 0.4
# name: timm's name (None: the packaged one), pixels, steps, learning rate
NETWORKS: dict[str, tuple[str | None, int, int, float]] = {
    "efficientnet_lite0": (None, 160, 25, 3e-4),
    "mobilenetv2": ("mobilenetv2_100", 96, 60, 2e-3),
    "resnet18": ("resnet18", 96, 60, 1e-3),
    "mobilenetv3_small": ("mobilenetv3_small_100", 96, 60, 2e-3),
    "efficientnet_b0": ("efficientnet_b0", 96, 60, 2e-3),
}
PRESETS = {
    "compact": lambda s: br.RazorConfig(s),
    "fill=mean": lambda s: br.RazorConfig(s, fill="mean"),
    "fill=zero": lambda s: br.RazorConfig(s, fill="zero", values="int8", activation="int2"),
    "paper": lambda s: br.RazorConfig.paper(s),
}


def batches(side: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches of digits, (16, 3, side, side) and labels (16,)."""
    images, labels = load_digits(return_X_y=True)
    x = (torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16 - MEAN) / STD
    y = torch.tensor(labels)
    order = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(x), generator=order).split(BATCH):
            if len(index) == BATCH:
                yield F.interpolate(x[index], side, mode="bilinear").expand(-1, 3, -1, -1).contiguous(), y[index]


def trained(name: str) -> nn.Module:
    """The network after its steps, batch norm frozen; its weights are kept in a file."""
    architecture, side, steps, rate = NETWORKS[name]
    torch.manual_seed(0)
    backbone = build(architecture or name, pretrained=architecture is None)
    model, file = backbone.model, WEIGHTS / f"{name}.pt"
    if architecture is None:
        freeze(backbone)
    if not file.exists():
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
        for x, y in itertools.islice(batches(side), steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file, weights_only=True))
    freeze(backbone)
    return model


def compare(name: str, configurations: dict[tuple[str, float], br.RazorConfig]) -> pd.DataFrame:
    """A row per configuration, batch and layer, the whole gradient as layer "overall"."""
    model, side, rows = trained(name), NETWORKS[name][1], []
    samples = list(itertools.islice(batches(side, seed=1), BATCHES))
    for (label, sparsity), config in configurations.items():
        for number, (x, y) in enumerate(samples):
            comparison = br.compare_gradients(model, x, lambda logits, y=y: F.cross_entropy(logits, y), config)
            about = {"network": name, "configuration": label, "sparsity": sparsity, "batch": number}
            rows += [
                about | {"layer": row.name, "cosine": row.cosine, "relative_norm": row.relative_norm}
                for row in (*comparison.by_layer(), comparison.overall)
            ]
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Per network, configuration and sparsity: the whole gradient's cosine, the median and the worst layer's, each a
    mean over the batches."""
    mean = table.groupby(["network", "configuration", "sparsity", "layer"], sort=False).cosine.mean().reset_index()
    keys = ["network", "configuration", "sparsity"]
    whole = mean[mean.layer == "overall"].set_index(keys).cosine
    layers = mean[mean.layer != "overall"].groupby(keys, sort=False)
    worst = mean.loc[layers.cosine.idxmin()].set_index(keys)
    return pd.DataFrame(
        {"whole": whole, "median layer": layers.cosine.median(), "worst layer": worst.cosine, "which": worst.layer}
    )


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--quick", action="store_true", help="compact only, nothing written")
    options = parser.parse_args()
    presets = {"compact": PRESETS["compact"]} if options.quick else PRESETS
    configurations = {(label, s): make(s) for label, make in presets.items() for s in SPARSITIES}
    tables = []
    for name in options.networks:
        tables.append(compare(name, configurations))
        print(summary(tables[-1]).to_string(float_format="%.4f"), flush=True)
    if not options.quick:
        table = pd.concat(tables).assign(**circumstances("python benchmarks/gradients_cnn.py"))
        table.to_csv(ROOT / "benchmarks/results/gradients_cnn.csv", index=False, float_format="%.5g")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
