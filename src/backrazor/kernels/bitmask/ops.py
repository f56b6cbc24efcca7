"""One bit per element as operators."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import implementation
from ..operators import operator
from . import reference
from .layout import mask_bytes


def _mask_encode_fake(x, low, high):
    return x.new_empty((x.shape[0], mask_bytes(x.shape[1])), dtype=torch.uint8)


@operator("mask_encode(Tensor x, float low, float high) -> Tensor", _mask_encode_fake)
def mask_encode(x: Tensor, low: float, high: float) -> Tensor:
    """(B, n) -> uint8 (B, ceil(n / 8)): 1 where not (x <= low or x >= high); a NaN ``high`` means no upper
    bound."""
    x = x.contiguous()
    fast = implementation("bitmask", x)
    return (fast or reference).encode(x, low, high)


@operator("mask_apply(Tensor grad, Tensor bits) -> Tensor", lambda grad, bits: torch.empty_like(grad))
def mask_apply(grad: Tensor, bits: Tensor) -> Tensor:
    """(B, n) and its bits -> grad where the bit is 1, zero elsewhere."""
    grad, bits = grad.contiguous(), bits.contiguous()
    fast = implementation("bitmask", grad)
    return (fast or reference).apply(grad, bits)
