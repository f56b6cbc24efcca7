"""Accuracy and loss on a split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

import backrazor as br
from razorlab.models.deeplab import stretched
from razorlab.training.distributed import World
from razorlab.training.network import Network, autocast


@dataclass(frozen=True)
class Scores:
    """Accuracies in percent, loss in nats, over ``images`` images.

    Where every pixel has a class, top1 is the share of labelled pixels that are right, the loss a mean over them, and
    ``mean_iou``, in percent, the mean over the classes that occur of intersection over union; there is no top5.
    """

    top1: float
    top5: float | None
    loss: float
    images: int
    mean_iou: float | None = None

    @property
    def selected(self) -> float:
        """What the best epoch is chosen by."""
        return self.top1 if self.mean_iou is None else self.mean_iou

    def figures(self) -> dict[str, float]:
        """Those that there are, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def training_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy, nats, of logits (N, C) and labels (N,), or of maps (N, C, H, W) and (N, H, W) without labels
    below zero. Of scores (N, C, s, s), as a razored segmenter gives them, the same without their maps."""
    if logits.shape[2:] == labels.shape[1:]:
        return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
    return br.functional.upsampled_cross_entropy(logits, labels, label_smoothing=smoothing)


def correct_in_top(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Count the rows of ``logits`` (N, C) whose label (N,) is among the k largest, all of them where C <= k: () int64.
    For maps, logits (N, C, H, W) and labels (N, H, W) of which those below zero do not count, N times the share of
    labelled pixels that are right: () float32; scores (N, C, s, s) are brought to size image by image.

    The count stays on the device: reading it would wait for all that is queued there.
    """
    if labels.dim() > 1:
        pairs = zip(logits.split(1), labels.split(1), strict=True)
        right = torch.stack([(stretched(x, y.shape[1:]).argmax(1) == y).sum() for x, y in pairs]).sum()
        return right * len(labels) / (labels >= 0).sum().clamp(min=1)
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
    classes = network.pixel_classes
    # top-1, top-5, loss, images; of pixels the confusion matrix, loss, images
    sums = torch.zeros(4 if classes is None else classes**2 + 2, dtype=torch.float64, device=device)
    for images, labels in loader:
        if check is not None:
            check()
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with autocast(device, precision):
            logits = network.model(network.normalise(images))
        logits = logits.float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        if classes is not None:
            sums[:-2] += confusion(logits, labels).flatten()
            sums[-2] += loss
        else:
            right = [correct_in_top(logits, labels, k) for k in (1, 5)]
            sums[:3] += torch.stack([*right, loss]).double()
        sums[-1] += len(labels)
    network.train()
    total = (world or World()).sum(sums)
    if classes is not None:
        return pixel_scores(torch.tensor(total[:-2], dtype=torch.float64).view(classes, classes), *total[-2:])
    top1, top5, loss, count = total
    return Scores(100 * top1 / count, 100 * top5 / count, loss / count, int(count))


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Count the pixels of each class (rows) that each class is named for (columns): (C, C) int64, of logits
    (N, C, H, W) and labels (N, H, W), those below zero left out."""
    classes = logits.shape[1]
    labelled = labels >= 0
    pairs = labels[labelled] * classes + logits.argmax(1)[labelled]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def pixel_scores(counts: Tensor, loss: float, images: float) -> Scores:
    """Scores of a confusion matrix (C, C), the loss summed over its pixels and the number of images.

    A class that is neither there nor named has no union: the mean leaves it out.
    """
    right, union = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
    met, pixels = union > 0, counts.sum()
    mean_iou = (right[met] / union[met]).mean()
    return Scores(float(100 * right.sum() / pixels), None, float(loss / pixels), int(images), float(100 * mean_iou))
