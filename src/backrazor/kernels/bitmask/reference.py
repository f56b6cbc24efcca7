"""One bit per element for piecewise-linear functions, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..topk.reference import pack_bits, unpack_bits


def encode(x: Tensor, low: float, high: float) -> Tensor:
    """(B, n) -> uint8 (B, ceil(n / 8)): 1 where not (x <= low or x >= high), so NaN gives 1; ``high`` NaN means no
    upper bound."""
    return pack_bits(~((x <= low) | (x >= high)))


def apply(grad: Tensor, bits: Tensor) -> Tensor:
    """(B, n), bits -> grad where the bit is 1, zero elsewhere."""
    return torch.where(unpack_bits(bits, grad.shape[1]), grad, grad.new_zeros(()))


def clamp_(y: Tensor, low: float, high: float) -> Tensor:
    """Clamp (B, n) to [low, high] in its place, ``high`` NaN meaning no upper bound; returns ``encode`` of what it
    was."""
    bits = encode(y, low, high)
    y.copy_(torch.where(y <= low, low, torch.where(y >= high, high, y)))
    return bits


def norm_scale(variance: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """(C,): what a norm on running statistics multiplies a channel by, of ``dtype``; computed in float32 at least."""
    wide = torch.promote_types(variance.dtype, torch.float32)
    scale = torch.rsqrt(variance.to(wide) + eps)
    return (scale if weight is None else scale * weight.to(wide)).to(dtype)


def scaled(grad: Tensor, bits: Tensor | None, variance: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """(B, C, *), bits -> ``grad`` times ``norm_scale`` where the bit is 1, zero elsewhere."""
    scale = norm_scale(variance, weight, eps, grad.dtype).view(1, -1, *(1,) * (grad.dim() - 2))
    if bits is not None:
        grad = apply(grad.reshape(grad.shape[0], math.prod(grad.shape[1:])), bits).view(grad.shape)
    return grad * scale
