"""Rows quantised with a scale of their own, in plain PyTorch: what normalisation layers keep of their input.

A row r of m elements is stored as q = round(((x - mean_r) * rstd_r) / scale_r), two's complement in 8 or 4 bits, with
scale_r = largest magnitude / 127 or / 7 as float16. All arithmetic is float32, in this order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..derivative.reference import pack_codes, unpack_codes


def encode(x: Tensor, mean: Tensor, rstd: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(R, m), mean and rstd (R,) float32 -> codes uint8 (R, ceil(m * bits / 8)), scales (R,) float16. A row that is not
    finite gets a scale of NaN or Inf."""
    normalised = (x.float() - mean.unsqueeze(1)) * rstd.unsqueeze(1)
    limit = 2 ** (bits - 1) - 1
    scales = (normalised.abs().amax(dim=1) / limit).to(torch.float16) if x.shape[1] else mean.to(torch.float16)
    scale = scales.float()
    usable = torch.isfinite(scale) & (scale != 0)
    inverse = torch.where(usable, 1 / scale, 0).unsqueeze(1)
    quantised = torch.round(normalised * inverse).clamp(-limit, limit).nan_to_num(nan=limit)
    codes = quantised.to(torch.int8).view(torch.uint8)
    return pack_codes(codes & 2**bits - 1 if bits < 8 else codes, bits), scales


def decode(
    codes: Tensor,
    scales: Tensor,
    m: int,
    bits: int,
    dtype: torch.dtype,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The normalised rows, (R, m) of ``dtype``: q * scale; then ``affine``."""
    codes = unpack_codes(codes, m, bits).to(torch.int32)
    signed = torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
    return affine((signed.float() * scales.float().unsqueeze(1)).to(dtype), weight, bias)


def affine(rows: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """rows (R, m) * weight (m,) + bias (m,) in place, rounded to their dtype after each step."""
    if weight is not None:
        rows.mul_(weight)
    return rows if bias is None else rows.add_(bias)
