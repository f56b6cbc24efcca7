"""Masks, one class per pixel: reading their files, and the transforms that treat an image and its mask alike.

Shape legend: S side of the input, pixels; H/W height/width of an image as it came.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from scipy.io import loadmat
from scipy.io.matlab import MatReadError
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

from razorlab.data.images import UnusableImage
from razorlab.data.spec import LabelledImages
from razorlab.data.transforms import flip_and_jitter
from razorlab.errors import UserError

UNLABELLED = 255  # in a mask: a pixel that counts neither in the loss nor in a score
IGNORED = -100  # the same in a target: what torch.nn.functional.cross_entropy leaves out
SCALES = (0.5, 2.0)  # of scale_crop, as DeepLab is trained
GREY = 124, 116, 104  # ImageNet's mean: what a scaled image is padded with, so that it normalises to about zero


class MaskSource(Protocol):
    """A sequence of masks (H, W) uint8: an index into the classes, or ``UNLABELLED``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...


@dataclass(frozen=True)
class MaskFiles:
    """Mask files, read when asked for: PNG whose pixel values are classes, or SBD's MATLAB files.

    Args:
        meaning: the class of each value in the file, where it is another; values beyond it are ``UNLABELLED``.
    """

    paths: tuple[Path, ...]
    meaning: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        mask = read_mask(self.paths[index])
        if self.meaning is None:
            return mask
        table = np.full(256, UNLABELLED, np.uint8)
        table[: len(self.meaning)] = self.meaning
        return table[mask]


def read_mask(path: Path) -> np.ndarray:
    """Read one mask, (H, W) uint8.

    Raises:
        UnusableImage: the file is missing, damaged, or holds no mask.
    """
    try:
        if path.suffix == ".mat":
            mask = loadmat(path, variable_names=["GTcls"])["GTcls"]["Segmentation"][0][0]
        else:
            with Image.open(path, formats=("PNG",)) as image:
                mask = np.asarray(image)
        if mask.ndim != 2 or mask.dtype != np.uint8:
            raise ValueError(f"{mask.dtype} {mask.shape}, not a class per pixel")
        return mask
    except (OSError, SyntaxError, ValueError, LookupError, zlib.error, MatReadError, NotImplementedError) as error:
        raise UnusableImage.because(path, f"cannot be read as a mask ({error})", ": remove or replace it") from error


class Pair(nn.Module):
    """A chain of torchvision's transforms on an image and its mask; none leaves both."""

    def __init__(self, *steps: nn.Module) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        for step in self.steps:
            image, mask = step(image, mask)
        return image, mask


class RandomScale(nn.Module):
    """Both brought to a random multiple of their size, uniform in ``SCALES``."""

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        low, high = SCALES
        factor = low + (high - low) * torch.rand(()).item()
        return _resized(image, mask, [max(1, round(side * factor)) for side in image.shape[-2:]])


class Fit(nn.Module):
    """Whole into S x S: brought down to size where a side is longer, then padded at the right and below."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        longest = max(image.shape[-2:])
        if longest > self.size:
            sides = [max(1, round(side * self.size / longest)) for side in image.shape[-2:]]
            image, mask = _resized(image, mask, sides)
        height, width = image.shape[-2:]
        margins = [0, 0, self.size - width, self.size - height]
        return vision.pad(image, margins, list(GREY)), vision.pad(mask, margins, UNLABELLED)


def _resized(image: Tensor, mask: Tensor, sides: list[int]) -> tuple[Tensor, Tensor]:
    return vision.resize(image, sides, antialias=True), vision.resize(mask, sides)  # a mask takes the nearest


def mask_train_transform(data: Mapping[str, Any]) -> tuple[Pair, Pair]:
    """The fixed and the random part of the training transform that ``data.train_transform`` names.

    ``scale_crop``: a random scale, then a random place of S x S, padded where the image is smaller. The others as for
    one class per image, the mask along with it.
    """
    size, kind = data["image_size"], data["train_transform"]
    fixed: list[nn.Module] = []
    random: list[nn.Module] = []
    if kind == "plain":
        fixed.append(v2.Resize((size, size), antialias=True))
    elif kind == "scale_crop":
        fill = {tv_tensors.Image: list(GREY), tv_tensors.Mask: UNLABELLED}
        random += [RandomScale(), v2.RandomCrop(size, pad_if_needed=True, fill=fill)]
    else:
        random.append(v2.RandomResizedCrop(size, (data["crop_scale_min"], 1.0), antialias=True))
    return Pair(*fixed), Pair(*random, *flip_and_jitter(data))


def mask_eval_transform(data: Mapping[str, Any]) -> tuple[Pair, Pair]:
    """``plain`` data is resized whole; of others the whole image is fitted in. No randomness."""
    size = data["image_size"]
    plain = data["train_transform"] == "plain"
    return Pair(v2.Resize((size, size), antialias=True) if plain else Fit(size)), Pair()


class MaskedImages(torch.utils.data.Dataset):
    """Images as uint8 tensors (3, S, S) with the class of each pixel, (S, S) int64 or ``IGNORED``.

    Args:
        source: images with masks.
        transform: the fixed part, whose result may be cached, and the random one.
        cache: keep the fixed part's result of each image once it was asked for (4*S*S bytes per image).
    """

    def __init__(self, source: LabelledImages, transform: tuple[Pair, Pair], cache: bool) -> None:
        self.source = source
        self.fixed, self.random = transform
        self.cached: dict[int, tuple[Tensor, Tensor]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        known = None if self.cached is None else self.cached.get(index)
        if known is None:
            known = self.fixed(*self._read(index))
            if self.cached is not None:
                self.cached[index] = known
        image, mask = self.random(*known)
        target = mask.as_subclass(Tensor).squeeze(0).long()
        return image.as_subclass(Tensor), target.masked_fill(target == UNLABELLED, IGNORED)

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.source.images[index], self.source.masks[index]
        if mask.shape != (image.height, image.width):
            raise UserError(
                f"image {index} has {image.width}x{image.height} pixels and its mask {mask.shape[1]}x{mask.shape[0]}: "
                "set the data up anew"
            )
        return tv_tensors.Image(vision.pil_to_tensor(image)), tv_tensors.Mask(torch.from_numpy(mask.copy())[None])
