"""Dropout that keeps one bit per element."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..codecs import Bits, Form, activation_of, load, pack_derivative, packed_of, remember_activation, save, times
from .common import needs_grad, reshaped
from .transforms import RazorFunction, differentiable_once, one_node


@one_node
def dropout(x: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
    """``F.dropout`` with the mask that it would draw from the same generator state; backward scales the kept elements
    by 1 / (1 - p). In 16-bit types on CUDA it agrees to rounding: there PyTorch multiplies by a factor that is not
    rounded."""
    if not needs_grad(x) or not training or p == 0 or x.numel() == 0:
        return F.dropout(x, p, training, inplace)
    noise = F.dropout(torch.ones_like(x), p, True)  # 0 or 1 / (1 - p): the factors PyTorch multiplies by
    activated = activation_of(x) is not None  # asked first: it may run in place
    out = _Dropout.run(x, noise, p, inplace, *pack_derivative(noise, Bits()).arguments)
    if activated:
        remember_activation(out)
    return out


class _Dropout(RazorFunction):
    @staticmethod
    def forward(x: Tensor, noise: Tensor, p: float, inplace: bool, form: Form, *stored: Tensor) -> Tensor:
        # the output takes the place of the factors, which nobody reads again
        return x.mul_(noise) if inplace else reshaped(noise, noise.shape).mul_(x)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        x, _, p, inplace, form, *stored = inputs
        ctx.scale = 0.0 if p == 1 else 1 / (1 - p)
        save(ctx, packed_of(form, stored))
        if inplace:
            ctx.mark_dirty(x)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = load(ctx)
        return times(grad, kept).mul_(ctx.scale), *(None for _ in ctx.needs_input_grad[1:])
