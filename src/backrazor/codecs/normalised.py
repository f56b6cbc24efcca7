"""What a normalisation layer keeps of its input, by the ``norm`` rule of the configuration.

Every rule is read back as the normalised input (x - mean) * rstd, since that is what the gradient's formula needs.
Rows: a token for LayerNorm, a group of channels of one sample for GroupNorm, a channel of one sample for BatchNorm. A
BatchNorm over vectors, such as tokens taken for samples, has one element per such row, and a scale for it would take
more than its code: there a row is the sample, in 8 bits. Channels differ, and at 4 bits the cosine of LeViT's gradient
is 0.40, with 8 it is 0.92.

Shape legend: B samples, R rows, m elements of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import bits_of
from ..kernels import row_decode, row_encode
from .packed import Form, Packed
from .pruned import Pruned, PrunedForm
from .roles import DENSE, QUANTISED, label_codes, mark

SHORTEST = 4  # elements of a row with a scale of its own


@dataclass(frozen=True, slots=True)
class NormCodec:
    """kind: "dense", "pruned", "bfloat16", "int8" or "int4"; ``pruned``: the codec behind "pruned"."""

    kind: str
    pruned: Pruned | None = None

    @property
    def bits(self) -> int | None:
        """The width of the normalised input's codes; None where the input itself is kept."""
        return bits_of(self.kind)

    def form(self, x: Tensor, rows: int) -> NormForm:
        """How x (B, ...) with ``rows`` rows in all is going to be stored."""
        packed = self.pruned.form(x) if self.kind == "pruned" else None
        bits = self.bits
        if bits is not None and rows and x.numel() // rows < SHORTEST:
            rows, bits = x.shape[0], 8
        return NormForm(tuple(x.shape), x.dtype, x.numel() // rows if rows else 0, bits, packed)

    def pack(self, x: Tensor, mean: Tensor, rstd: Tensor, flag: Tensor) -> Packed:
        """Keep x (B, ...) for the backward of a normalisation with statistics ``mean`` and ``rstd``: per channel (C,)
        or per row, float32."""
        mean_rows, rstd_rows = _rows_of(mean, x), _rows_of(rstd, x)
        form = self.form(x, mean_rows.numel())
        if form.bits is not None:
            if form.row * mean_rows.numel() != x.numel():  # a row per sample, of other statistics in each element
                wide = x.reshape(*mean_rows.shape, -1).float()
                x = (wide - mean_rows.unsqueeze(1)).mul_(rstd_rows.unsqueeze(1)).to(x.dtype).reshape(x.shape)
                mean_rows, rstd_rows = mean_rows.new_zeros(x.shape[0]), rstd_rows.new_ones(x.shape[0])
            codes, scales = row_encode(x.reshape(mean_rows.numel(), form.row), mean_rows, rstd_rows, form.bits)
            return Packed(label_codes(codes, scales, x.shape[0]), form)
        statistics = mark(mean.contiguous(), DENSE, "mean"), mark(rstd.contiguous(), DENSE, "reciprocal deviation")
        if form.pruned is not None:
            return Packed((*statistics, *form.pruned.pack(x, flag)), form)
        kept = x.to(torch.bfloat16) if x.element_size() > 2 else x.clone()
        return Packed((*statistics, mark(kept, QUANTISED)), form)


def _rows_of(statistics: Tensor, x: Tensor) -> Tensor:
    """One-dimensional statistics are a channel's, spread to one per row (B * C,); others are one per row already, the
    batch first."""
    if statistics.dim() == 1:
        return statistics.expand(x.shape[0], -1).reshape(-1)
    return statistics.reshape(-1)


@dataclass(frozen=True, slots=True)
class NormForm(Form):
    """A norm's input, read as the normalised one. ``row``: elements of a row. ``bits``: the stored tensors are codes
    and scales; None: mean, reciprocal deviation and the input, pruned where ``pruned`` says how, else in 16 bits."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    row: int
    bits: int | None
    pruned: PrunedForm | None = None

    @property
    def count(self) -> int:
        if self.bits is not None:
            return 2
        return 2 + (1 if self.pruned is None else self.pruned.count)

    def read(self, tensors: tuple[Tensor, ...], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        if self.bits is not None:
            return self.read_affine(tensors, start, stop, dtype, None, None)
        mean, rstd, *kept = tensors
        if mean.dim() > 1:  # one per row
            mean, rstd = (statistic.reshape(self.shape[0], -1)[start:stop] for statistic in (mean, rstd))
        else:
            mean, rstd = (statistic.expand(stop - start, -1) for statistic in (mean, rstd))
        if self.pruned is not None:
            return self.pruned.read_normalised(tuple(kept), (mean, rstd), start, stop, dtype)
        x = kept[0][start:stop].to(torch.promote_types(dtype, torch.float32))
        rows = x.reshape(stop - start, -1, self.row) - mean.unsqueeze(2)
        return rows.mul_(rstd.unsqueeze(2)).to(dtype).view(stop - start, *self.shape[1:])

    def read_affine(
        self,
        tensors: tuple[Tensor, ...],
        start: int,
        stop: int,
        dtype: torch.dtype,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """From codes: normalised * weight + bias, where they are given, (row,)."""
        codes, scales = (part[start:stop] for part in tensors)
        rows = codes.reshape(scales.numel(), -1), scales.reshape(-1)
        dense = row_decode(*rows, self.row, self.bits, dtype, weight, bias)
        return dense.view(stop - start, *self.shape[1:])


@dataclass(frozen=True, slots=True)
class AffineForm(Form):
    """A norm's output read from what the norm keeps, in 8 or 4 bits: normalised * weight + bias. Stored are the norm's
    codes and scales, then weight and bias where they exist."""

    norm: NormForm
    dtype: torch.dtype
    has_weight: bool
    has_bias: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.norm.shape

    @property
    def count(self) -> int:
        return 2 + self.has_weight + self.has_bias

    def read(self, tensors: tuple[Tensor, ...], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        affine = iter(tensors[2:])
        weight = next(affine).flatten() if self.has_weight else None
        bias = next(affine).flatten() if self.has_bias else None
        return self.norm.read_affine(tensors[:2], start, stop, dtype, weight, bias)
