"""What the quality benchmarks share: scikit-learn's digits as images, a small ViT, a training loop."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

TEST_IMAGES = 1000  # of 1,797, so that a point is ten images
SIDE = 32  # pixels; the originals have 8
BATCH = 32
SHIFT = 3  # pixels by which a batch is moved at most, both ways
SCRATCH_EPOCHS, SCRATCH_RATE = 40, 1e-3
WEIGHTS = Path(__file__).parents[1] / "outputs/accuracy"


class Digits(NamedTuple):
    """Images (B, 3, 32, 32) float32 in [-1, 1] and labels (B,)."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def load() -> Digits:
    """One stratified split, whatever the seed of the training."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    x = F.interpolate(x, SIDE, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    train, test = train_test_split(range(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=0)
    y = torch.tensor(labels)
    return Digits(x[train], y[train], x[test], y[test])


def vit() -> nn.Module:
    """2.7 M parameters: patches of 8 pixels, width 192, six blocks, heads of 32."""
    return VisionTransformer(img_size=SIDE, patch_size=8, embed_dim=192, depth=6, num_heads=6, num_classes=10)


def from_scratch(digits: Digits, seed: int) -> nn.Module:
    """The ViT trained on upright digits; its weights are kept in a file, so that an interrupted benchmark goes on."""
    torch.manual_seed(seed)
    model, file = vit(), WEIGHTS / f"seed{seed}.pt"
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model
    fit(model, digits.x, digits.y, SCRATCH_EPOCHS, SCRATCH_RATE, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return model


def fit(model: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float, seed: int, check=None) -> float:
    """AdamW under a one-cycle rate up to ``rate``, batches moved by up to 3 pixels; order and moves follow ``seed``.

    ``check(model)`` runs between backward and the optimizer's step. Returns the mean loss of the last epoch, in nats.
    """
    steps = len(x) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
    order, moves = torch.Generator().manual_seed(seed), random.Random(seed)
    model.train()
    for _ in range(epochs):
        losses = []
        for index in torch.randperm(len(x), generator=order)[: steps * BATCH].split(BATCH):
            move = moves.randint(-SHIFT, SHIFT), moves.randint(-SHIFT, SHIFT)
            loss = F.cross_entropy(model(x[index].roll(move, (2, 3))), y[index])
            optimizer.zero_grad()
            loss.backward()
            if check is not None:
                check(model)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Per cent right."""
    model.eval()
    return 100 * torch.cat([model(part).argmax(1) for part in x.split(250)]).eq(y).float().mean().item()
