"""Cosine of the gradient to the dense one, for a small ViT trained briefly on scikit-learn's digits.

python benchmarks/gradients.py            (CPU; writes benchmarks/results/gradients.csv and docs/gradients.md)
"""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import backrazor as br

ROOT = Path(__file__).parents[1]
SPARSITIES = (0.8, 0.9, 0.95, 0.97)
EXACT = {"values": "float32", "norm": "dense", "activation": "dense"}
CONFIGS = {
    "paper": lambda s: br.RazorConfig.paper(s),
    "compact": lambda s: br.RazorConfig.compact(s),
    "pruning alone": lambda s: br.RazorConfig(s, **EXACT, attention="pruned"),
    "pruning alone, attention dense": lambda s: br.RazorConfig(s, **EXACT, attention="dense"),
    "compact, values float32": lambda s: br.RazorConfig.compact(s, values="float32"),
    "compact, norm dense": lambda s: br.RazorConfig.compact(s, norm="dense"),
    "compact, activation dense": lambda s: br.RazorConfig.compact(s, activation="dense"),
    "compact, attention dense": lambda s: br.RazorConfig.compact(s, attention="dense"),
}


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (B, 3, 32, 32) in [-1, 1] with their labels; 40% are for the test."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    x = F.interpolate(x, 32, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    order = train_test_split(range(len(labels)), test_size=0.4, stratify=labels, random_state=0)
    y = torch.tensor(labels)
    return x[order[0]], y[order[0]], x[order[1]], y[order[1]]


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    """AdamW at a batch of 64, a one-cycle rate up to 1e-3."""
    steps = len(x) // 64
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(x))[: steps * 64].split(64):
            loss = F.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Per cent right."""
    model.eval()
    return 100 * torch.cat([model(part).argmax(1) for part in x.split(128)]).eq(y).float().mean().item()


def main(epochs: int = 10) -> None:
    """Train, compare, write."""
    torch.manual_seed(0)
    x, y, test_x, test_y = digits()
    model = VisionTransformer(img_size=32, patch_size=4, embed_dim=192, depth=6, num_heads=3, num_classes=10)
    train(model, x, y, epochs)
    score = accuracy(model, test_x, test_y)
    print(f"test accuracy {score:.2f}% after {epochs} epochs", flush=True)
    model.train()
    batches = {
        "train": (x[:32], y[:32]),
        "test": (test_x[:32], test_y[:32]),
        "inverted": (-test_x[32:64], test_y[32:64]),
    }
    rows = [
        {"config": name, "sparsity": sparsity, "batch": batch, "layer": row.name, "cosine": row.cosine}
        | {"relative_norm": row.relative_norm, "dense_norm": row.dense_norm}
        for name, make in CONFIGS.items()
        for sparsity in SPARSITIES
        for batch, data in batches.items()
        for row in _rows(model, *data, make(sparsity))
    ]
    circumstances = {
        "test_accuracy": round(score, 2),
        "epochs": epochs,
        "torch": torch.__version__,
        "device": platform.machine() + " CPU",
        "date": time.strftime("%Y-%m-%d"),
    }
    table = pd.DataFrame(rows).assign(**circumstances)
    table.to_csv(ROOT / "benchmarks/results/gradients.csv", index=False, float_format="%.5g")
    (ROOT / "docs/gradients.md").write_text(_markdown(table, score, epochs))


def _rows(model: nn.Module, x: Tensor, y: Tensor, config: br.RazorConfig) -> list:
    comparison = br.compare_gradients(model, x, lambda logits: F.cross_entropy(logits, y), config)
    return [*comparison.by_layer(), comparison.overall]


def _markdown(table: pd.DataFrame, score: float, epochs: int) -> str:
    overall = table[table.layer == "overall"]
    whole = overall.pivot_table(index="config", columns="sparsity", values="cosine", sort=False)
    batches = overall[overall.sparsity == 0.9].pivot_table(index="config", columns="batch", values="cosine", sort=False)
    layers = table[(table.sparsity == 0.9) & table.config.isin(["paper", "compact", "pruning alone"])]
    layers = layers.pivot_table(index="layer", columns="config", values="cosine", sort=False)
    text = [
        "# What pruning and quantising cost the gradient",
        "Cosine of the full parameter gradient to the dense one, the same weights and batch. A ViT (patch 4, 32 pixels, width 192, "
        f"6 blocks, 3 heads) trained for {epochs} epochs on scikit-learn's digits to {score:.1f}% test accuracy; batches of 32: from the "
        "training set, from the test set, and inverted test images. Made by `python benchmarks/gradients.py`, which writes every figure by "
        "layer to `benchmarks/results/gradients.csv`.",
        "## By sparsity, mean over the three batches",
        whole.to_markdown(floatfmt=".4f"),
        "## By batch, at 0.9",
        batches.to_markdown(floatfmt=".4f"),
        "## By layer, at 0.9, mean over the three batches",
        layers.to_markdown(floatfmt=".4f"),
    ]
    return "\n\n".join(text) + "\n"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
