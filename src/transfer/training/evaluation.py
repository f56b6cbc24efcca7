"""Accuracy and loss on a split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from transfer.training.distributed import World
from transfer.training.network import Network


@dataclass(frozen=True)
class Scores:
    """Accuracies in percent, loss in nats, over ``images`` images."""

    top1: float
    top5: float
    loss: float
    images: int


def correct_in_top(logits: Tensor, labels: Tensor, k: int) -> int:
    """Count the rows of ``logits`` (N, C) whose label (N,) is among the k largest; all of them where C <= k."""
    k = min(k, logits.shape[1])
    return int((logits.topk(k, dim=1).indices == labels[:, None]).any(dim=1).sum())


@torch.no_grad()
def evaluate(
    network: Network,
    loader: DataLoader,
    device: torch.device,
    precision: str,
    world: World | None = None,
    check: Callable[[], None] | None = None,
) -> Scores:
    """Score the network on every image of a split, in evaluation mode; the mode is set back afterwards.

    Args:
        loader: this process's share of the split.
        world: the processes that share it; each image is counted once.
        check: called before each batch; may raise.
    """
    network.model.eval()
    top1 = top5 = count = 0
    loss = 0.0
    for images, labels in loader:
        if check is not None:
            check()
        images, labels = images.to(device), labels.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = network.model(network.normalise(images))
        logits = logits.float()
        top1 += correct_in_top(logits, labels, 1)
        top5 += correct_in_top(logits, labels, 5)
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        count += len(labels)
    network.train()
    top1, top5, loss, count = (world or World()).sum([top1, top5, loss, count], device)
    return Scores(100 * top1 / count, 100 * top5 / count, loss / count, int(count))
