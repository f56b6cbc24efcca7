"""What a normalisation layer keeps of its input, by the ``norm`` rule of the configuration.

Every rule is read back as the normalised input (x - mean) * rstd, since that is what the gradient's formula needs.
Rows: a token for LayerNorm, a group of channels of one sample for GroupNorm, a channel of one sample for BatchNorm.

Shape legend: B samples, R rows, m elements a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import row_decode, row_encode
from .pruned import PackedLayout, Pruned, pack, unpack_normalised
from .roles import DENSE, QUANTISED, label_codes, mark


@dataclass(frozen=True, slots=True)
class NormCodec:
    """kind: "dense", "pruned", "bfloat16", "int8" or "int4"; ``pruned``: the codec behind "pruned"."""

    kind: str
    pruned: Pruned | None = None


@dataclass(frozen=True, slots=True)
class NormLayout:
    """How the kept tensors are read: the input's shape, its row length, the codec, and the layout of a pruned input."""

    shape: tuple[int, ...]
    row: int
    kind: str
    packed: PackedLayout | None = None


def _row_length(x: Tensor, rows: int) -> int:
    return x.numel() // rows if rows else 0


def _rows_of(statistics: Tensor, x: Tensor) -> Tensor:
    """One-dimensional statistics are a channel's, spread to one a row (B * C,); others are one a row already, the batch
    first."""
    if statistics.dim() == 1:
        return statistics.expand(x.shape[0], -1).reshape(-1)
    return statistics.reshape(-1)


def normalised_layout(x: Tensor, rows: int, codec: NormCodec) -> NormLayout:
    """How ``keep_normalised`` is going to store x (B, ...) with ``rows`` rows in all: known from the shape."""
    packed = codec.pruned.layout(x) if codec.kind == "pruned" else None
    return NormLayout(tuple(x.shape), _row_length(x, rows), codec.kind, packed)


def keep_normalised(
    x: Tensor, mean: Tensor, rstd: Tensor, codec: NormCodec, flag: Tensor
) -> tuple[tuple[Tensor, ...], NormLayout]:
    """Keep x (B, ...) for the backward of a normalisation with statistics ``mean`` and ``rstd``: a channel (C,) or one
    a row, float32."""
    mean_rows, rstd_rows = _rows_of(mean, x), _rows_of(rstd, x)
    layout = normalised_layout(x, mean_rows.numel(), codec)
    if codec.kind in ("int8", "int4"):
        bits = int(codec.kind.removeprefix("int"))
        codes, scales = row_encode(x.reshape(mean_rows.numel(), layout.row), mean_rows, rstd_rows, bits)
        return label_codes(codes, scales, x.shape[0]), layout
    statistics = mark(mean.contiguous(), DENSE, "mean"), mark(rstd.contiguous(), DENSE, "reciprocal deviation")
    if codec.kind == "pruned":
        return (*statistics, *pack(x, codec.pruned, flag).tensors), layout
    kept = x.to(torch.bfloat16) if x.element_size() > 2 else x.clone()
    return (*statistics, mark(kept, QUANTISED)), layout


def _read_rows(
    stored: tuple[Tensor, ...],
    layout: NormLayout,
    start: int,
    stop: int,
    dtype: torch.dtype,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Samples start to stop from their codes, (stop - start, ...) of ``dtype``, times weight plus bias (row,)."""
    codes, scales = (part[start:stop] for part in stored)
    rows = scales.numel()
    bits = int(layout.kind.removeprefix("int"))
    dense = row_decode(codes.reshape(rows, -1), scales.reshape(-1), layout.row, bits, dtype, weight, bias)
    return dense.view(stop - start, *layout.shape[1:])


def read_normalised(
    stored: tuple[Tensor, ...], layout: NormLayout, start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    """The normalised input of samples start to stop, (stop - start, ...) of ``dtype``."""
    if layout.kind in ("int8", "int4"):
        return _read_rows(stored, layout, start, stop, dtype)
    mean, rstd, *kept = stored
    batch = layout.shape[0]
    if mean.dim() > 1:  # one a row
        mean, rstd = (statistic.reshape(batch, -1)[start:stop] for statistic in (mean, rstd))
    else:
        mean, rstd = (statistic.expand(stop - start, -1) for statistic in (mean, rstd))
    if layout.kind == "pruned":
        return unpack_normalised(tuple(kept), layout.packed, (mean, rstd), start, stop, dtype)
    x = kept[0][start:stop].to(torch.promote_types(dtype, torch.float32))
    rows = x.reshape(stop - start, -1, layout.row) - mean.unsqueeze(2)
    return rows.mul_(rstd.unsqueeze(2)).to(dtype).view(stop - start, *layout.shape[1:])


@dataclass(frozen=True, slots=True)
class AffineLayout:
    """A norm's output read from what the norm keeps, in 8 or 4 bits: normalised * weight + bias. ``tensors`` are the
    codes and scales, then weight and bias where they exist."""

    norm: NormLayout
    dtype: torch.dtype
    has_weight: bool
    has_bias: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.norm.shape

    @property
    def sample_numel(self) -> int:
        return math.prod(self.norm.shape[1:])


def read_affine(tensors: tuple[Tensor, ...], layout: AffineLayout, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Samples start to stop of the norm's output, (stop - start, ...) of ``dtype``."""
    affine = iter(tensors[2:])  # after the codes and their scales
    weight = next(affine).flatten() if layout.has_weight else None
    bias = next(affine).flatten() if layout.has_bias else None
    return _read_rows(tensors[:2], layout.norm, start, stop, dtype, weight, bias)
