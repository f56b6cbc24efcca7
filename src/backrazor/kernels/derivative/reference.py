"""Quantised derivative of an elementwise function, in plain PyTorch.

The derivative is stored as the number of the interval of x it belongs to: 2^bits - 1 ascending thresholds cut the line,
and each interval has one level. A comparison with a float is exact everywhere, so all backends agree to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 (B, n) below 2^bits -> uint8 (B, ceil(n * bits / 8)); element i in the low bits of its byte first. bits is
    2, 4 or 8."""
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_byte)).view(
        codes.shape[0], -(-codes.shape[1] // per_byte), per_byte
    )
    packed = padded[:, :, 0].clone()
    for place in range(1, per_byte):
        packed |= padded[:, :, place] << (bits * place)
    return packed


def unpack_codes(packed: Tensor, n: int, bits: int) -> Tensor:
    """The inverse of ``pack_codes``: uint8 (B, n)."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(2) >> shifts) & (2**bits - 1)).flatten(1)[:, :n]


def encode(x: Tensor, thresholds: Tensor, bits: int) -> Tensor:
    """(B, n), thresholds (2^bits - 1,) float32 ascending -> packed codes: how many thresholds x reaches (x >= t); NaN
    reaches none."""
    codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for threshold in thresholds:
        codes += x.float() >= threshold
    return pack_codes(codes, bits)


def apply(grad: Tensor, codes: Tensor, levels: Tensor, bits: int) -> Tensor:
    """(B, n), packed codes, levels (2^bits,) float32 -> grad times the level of each element, in float32, rounded to
    grad's dtype."""
    level = levels[unpack_codes(codes, grad.shape[1], bits).long()]
    return (grad.float() * level).to(grad.dtype)
