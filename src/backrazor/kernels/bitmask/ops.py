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


@operator(
    "mask_clamp_(Tensor(a!) y, float low, float high) -> Tensor",
    lambda y, low, high: _mask_encode_fake(y, low, high),
)
def mask_clamp_(y: Tensor, low: float, high: float) -> Tensor:
    """Clamp contiguous y (B, n) to [low, high] in its place and return ``mask_encode`` of what it was; a NaN ``high``
    means no upper bound. On CUDA one pass does both."""
    fused = getattr(implementation("bitmask", y), "clamp_", reference.clamp_)  # Triton's alone
    return fused(y, low, high)


@operator(
    "mask_scale(Tensor grad, Tensor? bits, Tensor variance, Tensor? weight, float eps) -> Tensor",
    lambda grad, bits, variance, weight, eps: torch.empty_like(grad, memory_format=torch.contiguous_format),
)
def mask_scale(grad: Tensor, bits: Tensor | None, variance: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The backward of a norm on running statistics and of the clamp behind it: grad (B, C, *) where its bit is 1, zero
    elsewhere, times weight / sqrt(variance + eps) of its channel, (C,) each. On CUDA one pass does both; it agrees with
    the reference to rounding."""
    grad, bits = grad.contiguous(), None if bits is None else bits.contiguous()
    variance, weight = variance.contiguous(), None if weight is None else weight.contiguous()
    fused = getattr(implementation("bitmask", grad), "scaled", None)
    known = (t.dtype in (torch.float32, torch.float16, torch.bfloat16) for t in (variance, weight) if t is not None)
    return (fused if fused is not None and all(known) else reference.scaled)(grad, bits, variance, weight, eps)
