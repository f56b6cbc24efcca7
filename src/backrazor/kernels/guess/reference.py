"""Guesses at what is dropped, in plain PyTorch: one number per row of a sample, read from what is kept anyway.

A sample has R rows of m elements. A channel of a feature map is one (x (B, R * m), row by row), or a feature of tokens
(x (B, m * R), token by token). Only elements between ``low`` and ``high`` count, exclusively: those whose bit the
piecewise-linear activation before keeps. ``low`` = NaN: all of them.

Shape legend: B samples, n = R * m elements per sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..topk.reference import unpack_bits


def inside(x: Tensor, low: float, high: float) -> Tensor:
    """bool: whether the activation's bit is set. NaN passes."""
    return ~((x <= low) | (x >= high))


def as_rows(x: Tensor, rows: int, features: bool) -> Tensor:
    """(B, n) as (B, R, m): a view."""
    if features:
        return x.view(x.shape[0], -1, rows).transpose(1, 2)
    return x.view(x.shape[0], rows, -1)


def means(x: Tensor, rows: int, features: bool, low: float, high: float) -> Tensor:
    """(B, n) -> (B, R) float32: the mean of each row, 0 where nothing counts."""
    seen = as_rows(x, rows, features)
    if low != low:
        return seen.mean(2, dtype=torch.float32)
    counts = inside(seen, low, high)
    total = torch.where(counts, seen.float(), 0).sum(2)
    return total / counts.sum(2).clamp(min=1)


def without(x: Tensor, guess: Tensor, features: bool, low: float, high: float) -> Tensor:
    """A new tensor: (B, n) less ``guess`` (B, R) float32, rounded to the type of x."""
    seen = as_rows(x, guess.shape[1], features)
    spread = guess.unsqueeze(2)
    rest = seen - spread if low != low else seen - torch.where(inside(seen, low, high), spread, 0)
    return (rest.transpose(1, 2) if features else rest).to(x.dtype).reshape(x.shape)


def add_(out: Tensor, guess: Tensor, bits: Tensor | None, features: bool) -> None:
    """(B, n) += ``guess`` (B, R) float32 where ``bits`` (B, ceil(n / 8)) are set, everywhere without them."""
    seen = as_rows(out, guess.shape[1], features)
    spread = guess.to(out.dtype).unsqueeze(2)
    if bits is not None:
        mask = unpack_bits(bits, out.shape[1])
        spread = torch.where(as_rows(mask, guess.shape[1], features), spread, 0)
    seen.add_(spread)
