"""A tensor of tokens quantised a row at a time, without its mean over the tokens: what attention keeps of q, k and v.

Shape legend: B samples, H heads, N tokens, d elements a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import row_decode, row_encode
from .pruned import Packed
from .roles import DENSE, label_codes, mark


@dataclass(frozen=True, slots=True)
class RowsLayout:
    """shape (B, H, N, d), bits 4 or 8, and whether the mean over the tokens was kept (else it is left out for good)."""

    shape: tuple[int, int, int, int]
    bits: int
    keeps_mean: bool

    @property
    def count(self) -> int:
        """How many tensors are stored."""
        return 3 if self.keeps_mean else 2


def pack_rows(x: Tensor, bits: int, keeps_mean: bool) -> Packed:
    """x (B, H, N, d), any strides, less its mean over N; a float16 scale a row; the mean, if kept, in bfloat16 (a
    16-bit x: its own type)."""
    batch, heads, tokens, width = x.shape
    mean = x.mean(2, keepdim=True, dtype=torch.float32).to(torch.bfloat16 if x.element_size() > 2 else x.dtype)
    centred = (x - mean).to(x.dtype).reshape(-1, width)
    zero, one = x.new_zeros(centred.shape[0], dtype=torch.float32), x.new_ones(centred.shape[0], dtype=torch.float32)
    codes, scales = row_encode(centred, zero, one, bits)
    parts = label_codes(codes, scales, batch)
    if keeps_mean:
        parts = (*parts, mark(mean, DENSE, "mean over the tokens"))
    return Packed(parts, RowsLayout((batch, heads, tokens, width), bits, keeps_mean))


def unpack_rows(tensors: tuple[Tensor, ...], layout: RowsLayout, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Samples start to stop, (stop - start, H, N, d) of ``dtype``."""
    codes, scales, *mean = (part[start:stop] for part in tensors)
    rows = row_decode(codes.reshape(scales.numel(), -1), scales.reshape(-1), layout.shape[3], layout.bits, dtype)
    dense = rows.view(stop - start, *layout.shape[1:])
    return dense.add_(mean[0]) if layout.keeps_mean else dense
