"""Texts with a class each, as the numbers of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from razorlab.data.spec import LabelledImages

Encode: TypeAlias = Callable[[Sequence[str]], Tensor]  # texts -> (N, T) int64, padded


@dataclass(frozen=True)
class Texts:
    """What takes the place of images in ``LabelledImages``: a sequence of texts."""

    lines: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> str:
        return self.lines[index]


class EncodedTexts(torch.utils.data.Dataset):
    """Token numbers (T,) int64 with the class of their text.

    Args:
        source: texts with their classes.
        encode: makes all of them (N, T), once.
    """

    def __init__(self, source: LabelledImages, encode: Encode) -> None:
        texts: Any = source.images
        self.ids = encode([texts[index] for index in range(len(source))])
        self.labels = torch.tensor(source.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.ids[index], int(self.labels[index])
