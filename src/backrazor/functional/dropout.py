"""Dropout that keeps one bit an element."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..codecs import mark
from ..codecs.roles import MASK
from ..kernels import mask_apply, mask_encode
from .common import as_rows, from_rows, memory_format, needs_grad


def dropout(x: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
    """``F.dropout`` with the mask that it would draw from the same generator state; backward scales the kept elements
    by 1 / (1 - p)."""
    if not needs_grad(x) or not training or p == 0 or x.numel() == 0:
        return F.dropout(x, p, training, inplace)
    return _Dropout.apply(x, p, inplace)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float, inplace: bool) -> Tensor:
        ctx.scale, ctx.format = (0.0 if p == 1 else 1 / (1 - p)), memory_format(x)
        noise = F.dropout(torch.ones_like(x), p, True)  # 0 or 1 / (1 - p): the factors PyTorch multiplies by
        ctx.save_for_backward(mark(mask_encode(as_rows(noise, ctx.format), 0.0, float("nan")), MASK))
        if inplace:
            ctx.mark_dirty(x)
            return x.mul_(noise)
        return noise.mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        rows = mask_apply(as_rows(grad, ctx.format), bits)
        return from_rows(rows, grad.shape, ctx.format).mul_(ctx.scale), None, None
