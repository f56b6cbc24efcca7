"""Activations as rows, one per sample, in the order in which they lie in memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """The format in which elementwise work on x runs: channels_last where x lies so, else contiguous."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def as_rows(x: Tensor, layout: torch.memory_format) -> Tensor:
    """x (B, ...) as (B, n) in storage order of ``layout``: a view where x lies so, else a copy. A scalar is one sample
    of one element."""
    x = x.contiguous(memory_format=layout)
    if layout == torch.channels_last:
        x = x.permute(0, 2, 3, 1)
    batch = x.shape[0] if x.dim() else 1
    return x.reshape(batch, math.prod(x.shape[1:]))


def from_rows(rows: Tensor, shape: tuple[int, ...], layout: torch.memory_format) -> Tensor:
    """The inverse of ``as_rows`` for ``rows`` that nobody else holds, without a copy."""
    if layout == torch.channels_last:
        batch, channels, height, width = shape
        return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return reshaped(rows, shape)


def reshaped(fresh: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``fresh``, which nobody else holds, in another shape. Not a view: autograd adds a second gradient to the first in
    place only where no other tensor shares its storage, and a view would keep its base alive."""
    return torch.ops.aten._unsafe_view(fresh, shape)
