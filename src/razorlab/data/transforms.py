"""Transforms from an RGB image to a uint8 tensor of the size that the network takes, alone or with its mask.

A transform has a fixed part, whose result may be cached, and a random part. Both end in uint8, (3, S, S); the network's
normalisation is applied to a whole batch on its device. A mask, (1, H, W) of torchvision's class for it, goes the way
of its image by the nearest pixel, whatever ``data.interpolation`` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

if TYPE_CHECKING:
    from razorlab import schema

UNLABELLED = 255  # in a mask: a pixel that counts neither in the loss nor in a score
SCALES = (0.5, 2.0)  # of scale_crop, as DeepLab is trained
GREY = 124, 116, 104  # ImageNet's mean: what a scaled image is padded with, so that it normalises to about zero
RESIZE_MARGIN = 256 / 224  # what is cropped is first brought to image_size times this
INTERPOLATION = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC}
# How images are evaluated that were brought to size in training as the key says; with masks whole, unless squashed.
EVALUATED = {"plain": "squash", "random_crop": "center_crop", "resize_crop": "squash_crop", "scale_crop": "fit"}


@dataclass(frozen=True)
class TwoPartTransform:
    """``fixed`` maps an image to a uint8 tensor, ``random`` such a tensor to another; both take and return image and
    mask where they are called with both."""

    fixed: nn.Module
    random: nn.Module


def _interpolation(data: schema.Data) -> v2.InterpolationMode:
    return INTERPOLATION[data.get("interpolation", "bicubic")]  # a record may be older than the key


def _squash(size: int, interpolation: v2.InterpolationMode) -> v2.Resize:
    """To a square, whatever the image's sides."""
    return v2.Resize((size, size), interpolation=interpolation, antialias=True)


def _co_tuning_resize(size: int) -> v2.Resize:
    """The first step of the transform of Co-Tuning (You et al., NeurIPS 2020), which the released code takes for two
    data sets: Pillow's ``resize``, whose default is bicubic since Pillow 7, to a square of 256 pixels for 224."""
    return _squash(round(size * RESIZE_MARGIN), v2.InterpolationMode.BICUBIC)


class RandomScale(v2.Transform):
    """To a random multiple of the size, uniform in ``SCALES``."""

    def __init__(self, interpolation: v2.InterpolationMode = v2.InterpolationMode.BILINEAR) -> None:
        super().__init__()
        self.interpolation = interpolation

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The sides to bring to."""
        low, high = SCALES
        factor = low + (high - low) * torch.rand(()).item()
        return {"sides": [max(1, round(side * factor)) for side in flat_inputs[0].shape[-2:]]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """An image or a mask at those sides."""
        return vision.resize(inpt, params["sides"], self.interpolation, antialias=True)


class Fit(nn.Module):
    """Whole into S x S: brought down to size where a side is longer, then padded at the right and below."""

    def __init__(self, size: int, interpolation: v2.InterpolationMode = v2.InterpolationMode.BILINEAR) -> None:
        super().__init__()
        self.size, self.interpolation = size, interpolation

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        longest = max(image.shape[-2:])
        if longest > self.size:
            sides = [max(1, round(side * self.size / longest)) for side in image.shape[-2:]]
            image, mask = (vision.resize(x, sides, self.interpolation, antialias=True) for x in (image, mask))
        height, width = image.shape[-2:]
        margins = [0, 0, self.size - width, self.size - height]
        return vision.pad(image, margins, list(GREY)), vision.pad(mask, margins, UNLABELLED)


def eval_transform(data: schema.Data, masks: bool = False) -> TwoPartTransform:
    """Bring the image to the input size without randomness, as ``data.eval_transform`` says; null follows training.

    ``squash``: the whole image to a square. ``center_crop``: the shorter side to 256/224 of the input, then the middle.
    ``squash_crop``: the whole image to a square of 256/224 of the input, then the middle. With ``masks`` null fits the
    whole image in, so that every pixel is scored, unless training squashes it.
    """
    size, interpolation = data["image_size"], _interpolation(data)
    followed = "scale_crop" if masks and data["train_transform"] != "plain" else data["train_transform"]
    kind = data.get("eval_transform") or EVALUATED[followed]
    steps: list[nn.Module] = [v2.PILToTensor()]
    if kind == "fit":
        steps.append(Fit(size, interpolation))
    elif kind == "squash":
        steps.append(_squash(size, interpolation))
    else:
        margin = round(size * RESIZE_MARGIN)
        wider = v2.Resize(margin, interpolation=interpolation, antialias=True)
        steps += [wider if kind == "center_crop" else _co_tuning_resize(size), v2.CenterCrop(size)]
    return TwoPartTransform(v2.Compose(steps), v2.Identity())


def train_transform(data: schema.Data) -> TwoPartTransform:
    """The training transform that ``data.train_transform`` names.

    ``plain``: the whole image to a square. ``random_crop``: a random area of at least ``crop_scale_min``, brought to
    size. ``resize_crop``: the whole image to a square of 256/224 of the input, then the same. ``scale_crop``: a random
    scale, then a random place of S x S, padded where the image is smaller. ``flip`` and the jitters follow.
    """
    size, kind, interpolation = data["image_size"], data["train_transform"], _interpolation(data)
    fixed: list[nn.Module] = [v2.PILToTensor()]
    random: list[nn.Module] = []
    if kind == "plain":
        fixed.append(_squash(size, interpolation))
    elif kind == "scale_crop":
        fill: dict[Any, Any] = {tv_tensors.Image: list(GREY), tv_tensors.Mask: UNLABELLED}
        random += [RandomScale(interpolation), v2.RandomCrop(size, pad_if_needed=True, fill=fill)]
    else:
        if kind == "resize_crop":
            fixed.append(_co_tuning_resize(size))
        scale = (data["crop_scale_min"], 1.0)
        random.append(v2.RandomResizedCrop(size, scale, interpolation=interpolation, antialias=True))
    if data["flip"]:
        random.append(v2.RandomHorizontalFlip())
    if data["color_jitter"] or data["hue_jitter"]:
        jitter = data["color_jitter"]
        random.append(v2.ColorJitter(jitter, jitter, jitter, data["hue_jitter"]))
    return TwoPartTransform(v2.Compose(fixed), v2.Compose(random) if random else v2.Identity())
