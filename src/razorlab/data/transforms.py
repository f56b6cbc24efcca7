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

RESIZE_MARGIN = 256 / 224  # what is cropped is first brought to image_size times this
INTERPOLATION = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC}
# How images are evaluated that were brought to size in training as the key says.
EVALUATED = {"plain": "squash", "random_crop": "center_crop", "resize_crop": "squash_crop"}


@dataclass(frozen=True)
class TwoPartTransform:
    """``fixed`` maps an image to a uint8 tensor, ``random`` such a tensor to another."""

    fixed: nn.Module
    random: nn.Module


def _interpolation(data: Mapping[str, Any]) -> v2.InterpolationMode:
    return INTERPOLATION[data.get("interpolation", "bicubic")]  # a record may be older than the key


def _squash(size: int, interpolation: v2.InterpolationMode) -> v2.Resize:
    """To a square, whatever the image's sides."""
    return v2.Resize((size, size), interpolation=interpolation, antialias=True)


def _co_tuning_resize(size: int) -> v2.Resize:
    """The first step of the transform of Co-Tuning (You et al., NeurIPS 2020), which the released code takes for two
    data sets: Pillow's ``resize``, whose default is bicubic since Pillow 7, to a square of 256 pixels for 224."""
    return _squash(round(size * RESIZE_MARGIN), v2.InterpolationMode.BICUBIC)


def eval_transform(data: Mapping[str, Any]) -> TwoPartTransform:
    """Bring the image to the input size without randomness, as ``data.eval_transform`` says; null follows training.

    ``squash``: the whole image to a square. ``center_crop``: the shorter side to 256/224 of the input, then the middle.
    ``squash_crop``: the whole image to a square of 256/224 of the input, then the middle.
    """
    size, interpolation = data["image_size"], _interpolation(data)
    kind = data.get("eval_transform") or EVALUATED[data["train_transform"]]
    steps: list[nn.Module] = [v2.PILToTensor()]
    if kind == "squash":
        steps.append(_squash(size, interpolation))
    else:
        margin = round(size * RESIZE_MARGIN)
        wider = v2.Resize(margin, interpolation=interpolation, antialias=True)
        steps += [wider if kind == "center_crop" else _co_tuning_resize(size), v2.CenterCrop(size)]
    return TwoPartTransform(v2.Compose(steps), nn.Identity())


def train_transform(data: Mapping[str, Any]) -> TwoPartTransform:
    """The training transform that ``data.train_transform`` names.

    ``plain``: the whole image to a square. ``random_crop``: a random area of at least ``crop_scale_min``, brought to
    size. ``resize_crop``: the whole image to a square of 256/224 of the input, then the same. ``flip`` and the jitters
    follow.
    """
    size, kind, interpolation = data["image_size"], data["train_transform"], _interpolation(data)
    fixed: list[nn.Module] = [v2.PILToTensor()]
    random: list[nn.Module] = []
    if kind == "plain":
        fixed.append(_squash(size, interpolation))
    else:
        if kind == "resize_crop":
            fixed.append(_co_tuning_resize(size))
        scale = (data["crop_scale_min"], 1.0)
        random.append(v2.RandomResizedCrop(size, scale, interpolation=interpolation, antialias=True))
    random += flip_and_jitter(data)
    return TwoPartTransform(v2.Compose(fixed), v2.Compose(random) if random else nn.Identity())


def flip_and_jitter(data: Mapping[str, Any]) -> list[nn.Module]:
    """What ``data.flip`` and the jitters add to the end of a random part."""
    steps: list[nn.Module] = [v2.RandomHorizontalFlip()] if data["flip"] else []
    if data["color_jitter"] or data["hue_jitter"]:
        jitter = data["color_jitter"]
        steps.append(v2.ColorJitter(jitter, jitter, jitter, data["hue_jitter"]))
    return steps
