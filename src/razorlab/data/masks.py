"""Masks, one class per pixel: reading their files, and a data set of images with theirs.

Shape legend: S side of the input, pixels; H/W height/width of an image as it came.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from scipy.io import loadmat
from scipy.io.matlab import MatReadError
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as vision

from razorlab.data.images import UnusableImage
from razorlab.data.spec import LabelledImages
from razorlab.data.transforms import UNLABELLED, TwoPartTransform
from razorlab.errors import UserError

IGNORED = -100  # in a target what UNLABELLED is in a mask: what torch.nn.functional.cross_entropy leaves out


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


class MaskedImages(torch.utils.data.Dataset):
    """Images as uint8 tensors (3, S, S) with the class of each pixel, (S, S) int64 or ``IGNORED``.

    Args:
        source: images with masks.
        transform: to the network's size, of both.
        cache: keep the fixed part's result of each image once it was asked for (4*S*S bytes per image).
    """

    def __init__(self, source: LabelledImages, transform: TwoPartTransform, cache: bool) -> None:
        self.source = source
        self.transform = transform
        self.cached: dict[int, tuple[Tensor, Tensor]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        known = None if self.cached is None else self.cached.get(index)
        if known is None:
            known = self.transform.fixed(*self._read(index))
            if self.cached is not None:
                self.cached[index] = known
        image, mask = self.transform.random(*known)
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
