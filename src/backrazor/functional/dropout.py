"""Dropout that keeps one bit an element."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..codecs import mark
from ..codecs.roles import MASK
from ..kernels import mask_apply, mask_encode
from .common import as_rows, from_rows, memory_format, needs_grad, reshaped
from .transforms import differentiable_once


def dropout(x: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
    """``F.dropout`` with the mask that it would draw from the same generator state; backward scales the kept elements
    by 1 / (1 - p)."""
    if not needs_grad(x) or not training or p == 0 or x.numel() == 0:
        return F.dropout(x, p, training, inplace)
    noise = F.dropout(torch.ones_like(x), p, True)  # 0 or 1 / (1 - p): the factors PyTorch multiplies by
    bits = mark(mask_encode(as_rows(noise, memory_format(x)), 0.0, float("nan")), MASK)
    return _Dropout.apply(x, noise, bits, p, inplace)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, noise: Tensor, bits: Tensor, p: float, inplace: bool) -> Tensor:
        # the output takes the place of the factors, which nobody reads again
        return x.mul_(noise) if inplace else reshaped(noise, noise.shape).mul_(x)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        x, _, bits, p, inplace = inputs
        ctx.scale, ctx.format = (0.0 if p == 1 else 1 / (1 - p)), memory_format(x)
        ctx.save_for_backward(bits)
        if inplace:
            ctx.mark_dirty(x)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        rows = mask_apply(as_rows(grad, ctx.format), bits)
        return from_rows(rows, grad.shape, ctx.format).mul_(ctx.scale), *(None,) * 4
