"""Accuracy and loss on a split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from transfer.training.distributed import World
from transfer.training.network import Network, autocast


@dataclass(frozen=True)
class Scores:
    """Accuracies in percent, loss in nats, over ``images`` images."""

    top1: float
    top5: float
    loss: float
    images: int


def correct_in_top(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Count the rows of ``logits`` (N, C) whose label (N,) is among the k largest, all of them where C <= k: () int64.

    The count stays on the device: reading it would wait for all that is queued there.
    """
    k = min(k, logits.shape[1])
    return (logits.topk(k, dim=1).indices == labels[:, None]).any(dim=1).sum()


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
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # top-1, top-5, loss, images
    for images, labels in loader:
        if check is not None:
            check()
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with autocast(device, precision):
            logits = network.model(network.normalise(images))
        logits = logits.float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums[:3] += torch.stack([correct_in_top(logits, labels, 1), correct_in_top(logits, labels, 5), loss]).double()
        sums[3] += len(labels)
    network.train()
    top1, top5, loss, count = (world or World()).sum(sums)
    return Scores(100 * top1 / count, 100 * top5 / count, loss / count, int(count))
