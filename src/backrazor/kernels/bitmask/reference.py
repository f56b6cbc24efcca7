"""One bit per element for piecewise-linear functions, in plain PyTorch."""

from __future__ import annotations

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
