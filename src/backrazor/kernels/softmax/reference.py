"""The backward of dropout(softmax(scale * scores)), in plain PyTorch, from the softmax output as it was kept.

Shape legend: B samples, * rows of m elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bitmask import reference as bitmask


def backward(grad: Tensor, p: Tensor, bits: Tensor | None, keep_scale: float, scale: float) -> Tensor:
    """The gradient of the scores (B, *, m): scale * p * (g - sum(g * p)), sums over m, with g = grad * keep_scale where
    ``bits`` uint8 (B, ceil(* m / 8)) is 1 and zero elsewhere; without ``bits`` g = grad."""
    if bits is not None:
        grad = bitmask.apply(grad.flatten(1), bits).view(grad.shape).mul_(keep_scale)
    return torch.ops.aten._softmax_backward_data(grad, p, -1, p.dtype).mul_(scale)
