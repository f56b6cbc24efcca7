"""The backward of a softmax as an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import implementation
from ..operators import operator
from . import reference


def fused_softmax(grad: Tensor) -> bool:
    """Whether ``softmax_backward`` is one kernel for a gradient of this type and device."""
    return implementation("softmax", grad) is not None


@operator(
    "softmax_backward(Tensor grad, Tensor p, Tensor? bits, float keep_scale, float scale) -> Tensor",
    lambda grad, p, bits, keep_scale, scale: torch.empty_like(grad, memory_format=torch.contiguous_format),
)
def softmax_backward(grad: Tensor, p: Tensor, bits: Tensor | None, keep_scale: float, scale: float) -> Tensor:
    """The gradient of the scores (B, *, m) from that of dropout(softmax(scale * scores)) and the softmax
    output p; ``bits`` (B, ceil(* m / 8)) and ``keep_scale`` are the dropout's."""
    grad, p, bits = grad.contiguous(), p.contiguous(), None if bits is None else bits.contiguous()
    fast = implementation("softmax", grad)
    return (fast or reference).backward(grad, p, bits, keep_scale, scale)
