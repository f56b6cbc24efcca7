"""A tensor of tokens quantised row by row, without its mean over the tokens: what attention keeps of q, k and v.

Shape legend: B samples, H heads, N tokens, d elements of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import row_decode, row_encode
from .packed import Form, Packed
from .roles import DENSE, label_codes, mark


@dataclass(frozen=True, slots=True)
class Rows:
    """``bits`` 4 or 8 per element, and whether the mean over the tokens is kept, or left out for good."""

    bits: int
    keeps_mean: bool

    def form(self, x: Tensor) -> RowsForm:
        """How x (B, H, N, d) is going to be stored."""
        return RowsForm(tuple(x.shape), x.dtype, self)

    def pack(self, x: Tensor) -> Packed:
        """x (B, H, N, d), any strides, less its mean over N; a float16 scale per row; the mean, if kept, in bfloat16 (a
        16-bit x: its own type)."""
        batch, width = x.shape[0], x.shape[3]
        mean = x.mean(2, keepdim=True, dtype=torch.float32).to(torch.bfloat16 if x.element_size() > 2 else x.dtype)
        centred = (x - mean).to(x.dtype).reshape(-1, width)
        rows = centred.shape[0]
        zero, one = x.new_zeros(rows, dtype=torch.float32), x.new_ones(rows, dtype=torch.float32)
        codes, scales = row_encode(centred, zero, one, self.bits)
        parts = label_codes(codes, scales, batch)
        if self.keeps_mean:
            parts = (*parts, mark(mean, DENSE, "mean over the tokens"))
        return Packed(parts, self.form(x))


@dataclass(frozen=True, slots=True)
class RowsForm(Form):
    """Codes, scales and, if kept, the mean."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    codec: Rows

    @property
    def count(self) -> int:
        return 3 if self.codec.keeps_mean else 2

    def read(self, tensors: tuple[Tensor, ...], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        codes, scales, *mean = (part[start:stop] for part in tensors)
        rows = codes.reshape(scales.numel(), -1), scales.reshape(-1)
        dense = row_decode(*rows, self.shape[3], self.codec.bits, dtype).view(stop - start, *self.shape[1:])
        return dense.add_(mean[0]) if mean else dense
