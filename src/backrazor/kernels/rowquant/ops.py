"""Quantised rows as operators."""

from __future__ import annotations

import torch
from torch import Tensor

from ..derivative.layout import code_bytes
from ..dispatch import implementation
from ..operators import operator
from . import reference


def encode_fake(x, mean, rstd, bits):
    return (
        x.new_empty((x.shape[0], code_bytes(x.shape[1], bits)), dtype=torch.uint8),
        x.new_empty((x.shape[0],), dtype=torch.float16),
    )


@operator("row_encode(Tensor x, Tensor mean, Tensor rstd, int bits) -> (Tensor, Tensor)", encode_fake)
def row_encode(x: Tensor, mean: Tensor, rstd: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(R, m), mean and rstd (R,) float32 -> codes uint8 (R, ceil(m * bits / 8)) and scales (R,) float16 of
    (x - mean) * rstd."""
    x, mean, rstd = x.contiguous(), mean.contiguous(), rstd.contiguous()
    fast = implementation("rowquant", x)
    return (fast or reference).encode(x, mean, rstd, bits)


def _row_decode_fake(codes, scales, m, bits, dtype, weight=None, bias=None):
    return codes.new_empty((codes.shape[0], m), dtype=dtype)


@operator(
    "row_decode(Tensor codes, Tensor scales, int m, int bits, ScalarType dtype, Tensor? weight=None, "
    "Tensor? bias=None) -> Tensor",
    _row_decode_fake,
)
def row_decode(
    codes: Tensor,
    scales: Tensor,
    m: int,
    bits: int,
    dtype: torch.dtype,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The normalised rows, (R, m) of ``dtype``, times weight (m,) plus bias (m,) where given."""
    codes, scales = codes.contiguous(), scales.contiguous()
    fast = implementation("rowquant", torch.empty(0, dtype=dtype, device=codes.device))
    return (fast or reference).decode(codes, scales, m, bits, dtype, weight, bias)
