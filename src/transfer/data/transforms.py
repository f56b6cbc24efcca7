"""Transforms from an RGB image to a uint8 tensor of the size that the network takes.

A transform has a fixed part, whose result may be cached, and a random part. Both end in uint8, (3, S, S); the network's
normalisation is applied to a whole batch on its device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchvision.transforms import v2

from transfer.errors import UserError

RESIZE_MARGIN = 256 / 224  # resize_crop first brings the shorter side to image_size times this


@dataclass(frozen=True)
class TwoPartTransform:
    """``fixed`` maps an image to a uint8 tensor, ``random`` such a tensor to another."""

    fixed: nn.Module
    random: nn.Module


def _resize(size: int | tuple[int, int]) -> v2.Resize:
    return v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)


def eval_transform(data: Mapping[str, Any]) -> TwoPartTransform:
    """Resize to the input size, centre crop; no randomness.

    ``plain`` data is resized whole; others keep the margin around the crop that training saw.
    """
    size = data["image_size"]
    steps: list[nn.Module] = [v2.PILToTensor()]
    if data["train_transform"] == "plain":
        steps += [_resize((size, size))]
    else:
        steps += [_resize(round(size * RESIZE_MARGIN)), v2.CenterCrop(size)]
    return TwoPartTransform(v2.Compose(steps), nn.Identity())


def train_transform(data: Mapping[str, Any]) -> TwoPartTransform:
    """The training transform that ``data.train_transform`` names.

    ``plain``: resize. ``random_crop``: a random area of at least ``crop_scale_min``, brought to size. ``resize_crop``:
    shorter side to 256/224 of the input, then the same. ``flip`` and the jitters follow.
    """
    size, kind = data["image_size"], data["train_transform"]
    if kind == "scale_crop":
        raise UserError.value("data.train_transform", kind, "plain|random_crop|resize_crop, for task=classification")
    fixed: list[nn.Module] = [v2.PILToTensor()]
    random: list[nn.Module] = []
    if kind == "plain":
        fixed.append(_resize((size, size)))
    else:
        if kind == "resize_crop":
            fixed.append(_resize(round(size * RESIZE_MARGIN)))
        scale = (data["crop_scale_min"], 1.0)
        random.append(v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True))
    if data["flip"]:
        random.append(v2.RandomHorizontalFlip())
    if data["color_jitter"] or data["hue_jitter"]:
        jitter = data["color_jitter"]
        random.append(v2.ColorJitter(jitter, jitter, jitter, data["hue_jitter"]))
    return TwoPartTransform(v2.Compose(fixed), v2.Compose(random) if random else nn.Identity())
