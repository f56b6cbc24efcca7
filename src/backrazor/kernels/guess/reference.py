"""Guesses at what is dropped, in plain PyTorch: one number per row of a sample, read from what is kept anyway.

A sample has R rows of m elements. A channel of a feature map is one (x (B, R * m), row by row), or a feature of tokens
(x (B, m * R), token by token). Only elements between ``low`` and ``high`` count, exclusively: those whose bit the
piecewise-linear activation before keeps. ``low`` = NaN: all of them. A smooth activation keeps a code per element. Then
the guess is the row's number times the number that the code stands for.

Shape legend: B samples, n = R * m elements per sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..derivative.reference import unpack_codes
from ..topk.layout import Stored
from ..topk.ops import topk_pack, topk_unpack
from ..topk.reference import decode_values, unpack_bits
from .layout import SMALLEST, Guesses

DIFFERENCES_BYTES = 4 << 20  # differences exist for so many samples that they take no more, or for one per thread


def inside(x: Tensor, low: float, high: float) -> Tensor:
    """bool: whether the activation's bit is set. NaN passes."""
    return ~((x <= low) | (x >= high))


def as_rows(x: Tensor, rows: int, features: bool) -> Tensor:
    """(B, n) as (B, R, m): a view."""
    if features:
        return x.view(x.shape[0], -1, rows).transpose(1, 2)
    return x.view(x.shape[0], rows, -1)


def told(guesses: Guesses, n: int) -> Tensor | None:
    """What the codes of an activation stand for, (B, n) float32; None where there are none."""
    if guesses.known is None:
        return None
    return guesses.levels[unpack_codes(guesses.known, n, guesses.known_bits).long()]


def means(x: Tensor, rows: int, features: bool, low: float, high: float, told: Tensor | None = None) -> Tensor:
    """(B, n) -> (B, R) float32: the mean of each row, 0 where nothing counts. With ``told`` (B, n), the number that
    times ``told`` comes closest to the row, by least squares."""
    seen = as_rows(x, rows, features)
    if told is not None:
        level = as_rows(told, rows, features)
        return (seen.float() * level).sum(2) / level.square().sum(2).clamp(min=SMALLEST)
    if low != low:
        return seen.mean(2, dtype=torch.float32)
    counts = inside(seen, low, high)
    total = torch.where(counts, seen.float(), 0).sum(2)
    return total / counts.sum(2).clamp(min=1)


def without(x: Tensor, guess: Tensor, features: bool, low: float, high: float, told: Tensor | None = None) -> Tensor:
    """A new tensor: (B, n) less ``guess`` (B, R) float32, times ``told`` (B, n) where given, rounded to the type of
    x."""
    seen = as_rows(x, guess.shape[1], features)
    spread = guess.unsqueeze(2)
    if told is not None:
        spread = spread * as_rows(told, guess.shape[1], features)
    rest = seen - spread if low != low else seen - torch.where(inside(seen, low, high), spread, 0)
    return (rest.transpose(1, 2) if features else rest).to(x.dtype).reshape(x.shape)


def add_(out: Tensor, guess: Tensor, bits: Tensor | None, features: bool, told: Tensor | None = None) -> None:
    """(B, n) += ``guess`` (B, R) float32 where ``bits`` (B, ceil(n / 8)) are set, everywhere without them; times
    ``told`` (B, n) where given."""
    seen = as_rows(out, guess.shape[1], features)
    if told is not None:
        seen.add_((guess.unsqueeze(2) * as_rows(told, guess.shape[1], features)).to(out.dtype))
        return
    spread = guess.to(out.dtype).unsqueeze(2)
    if bits is not None:
        mask = unpack_bits(bits, out.shape[1])
        spread = torch.where(as_rows(mask, guess.shape[1], features), spread, 0)
    seen.add_(spread)


def pack(
    x: Tensor, keep: int, values: str, index: str, made: tuple[Tensor, ...], guesses: Guesses, flag: Tensor
) -> tuple[Tensor, ...]:
    """Fill ``made``, the tensors of ``Stored`` and of ``guesses``, from x (B, ...), some samples at a time."""
    batch, rows = guesses.codes.shape
    sample_bytes = x[:1].numel() * x.element_size()
    together = max(DIFFERENCES_BYTES // max(sample_bytes, 1), torch.get_num_threads())
    for start in range(0, batch, together):
        part = x[start : start + together].reshape(min(together, batch - start), -1)
        some = guesses.of_samples(start, start + together)
        seen = guesses.features, guesses.low, guesses.high, told(some, part.shape[1])
        averages = means(part, rows, *seen)
        codes, scales, *_ = topk_pack(averages, rows, "int8", "none", flag)
        guess = decode_values(codes, scales, rows, torch.float32)
        rest = without(part, guess, *seen)
        packed = topk_pack(rest, keep, values, index, flag)
        for whole, piece in zip(made, (*packed, codes, scales), strict=True):
            whole[start : start + together] = piece
    return made


def unpack(stored: Stored, guesses: Guesses, bits: Tensor | None, n: int, index: str, dtype: torch.dtype) -> Tensor:
    """(B, n) of ``dtype``."""
    out = topk_unpack(*stored, n, index, dtype)
    guess = decode_values(guesses.codes, guesses.scales, guesses.codes.shape[1], torch.float32)
    add_(out, guess, bits, guesses.features, told(guesses, n))
    return out
