"""Quantised derivatives as operators."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import implementation
from ..operators import operator
from . import reference
from .layout import code_bytes


def _level_encode_fake(x, thresholds, bits):
    return x.new_empty((x.shape[0], code_bytes(x.shape[1], bits)), dtype=torch.uint8)


@operator("level_encode(Tensor x, Tensor thresholds, int bits) -> Tensor", _level_encode_fake)
def level_encode(x: Tensor, thresholds: Tensor, bits: int) -> Tensor:
    """(B, n), thresholds (2^bits - 1,) float32 ascending -> uint8 (B, ceil(n * bits / 8)): how many
    thresholds x reaches."""
    x = x.contiguous()
    fast = implementation("derivative", x)
    return (fast or reference).encode(x, thresholds, bits)


@operator(
    "level_apply(Tensor grad, Tensor codes, Tensor levels, int bits) -> Tensor",
    lambda grad, codes, levels, bits: torch.empty_like(grad),
)
def level_apply(grad: Tensor, codes: Tensor, levels: Tensor, bits: int) -> Tensor:
    """(B, n), codes, levels (2^bits,) float32 -> grad times each element's level."""
    grad, codes = grad.contiguous(), codes.contiguous()
    fast = implementation("derivative", grad)
    return (fast or reference).apply(grad, codes, levels, bits)
