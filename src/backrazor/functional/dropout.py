"""Dropout that keeps one bit an element."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..codecs import mark
from ..codecs.roles import MASK
from ..kernels import mask_apply, mask_encode
from .common import as_rows, from_rows, memory_format, needs_grad
from .transforms import differentiable_once


def dropout(x: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
    """``F.dropout`` with the mask that it would draw from the same generator state; backward scales the kept elements
    by 1 / (1 - p)."""
    if not needs_grad(x) or not training or p == 0 or x.numel() == 0:
        return F.dropout(x, p, training, inplace)
    out, _ = _Dropout.apply(x, p, inplace)
    return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, p: float, inplace: bool) -> tuple[Tensor, Tensor]:
        noise = F.dropout(torch.ones_like(x), p, True)  # 0 or 1 / (1 - p): the factors PyTorch multiplies by
        bits = mark(mask_encode(as_rows(noise, memory_format(x)), 0.0, float("nan")), MASK)
        return (x.mul_(noise) if inplace else noise.mul_(x)), bits

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        x, p, inplace = inputs
        _, bits = output
        ctx.scale, ctx.format = (0.0 if p == 1 else 1 / (1 - p)), memory_format(x)
        ctx.mark_non_differentiable(bits)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(bits)
        if inplace:
            ctx.mark_dirty(x)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        rows = mask_apply(as_rows(grad, ctx.format), bits)
        return from_rows(rows, grad.shape, ctx.format).mul_(ctx.scale), None, None
