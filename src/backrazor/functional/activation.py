"""Activations: piecewise-linear ones keep one bit per element, smooth ones a quantised derivative or a 16-bit input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..codecs import (
    Bits,
    Form,
    Half,
    Packed,
    load,
    pack_derivative,
    packed_of,
    remember_activation,
    save,
    smooth_codec,
    times,
)
from ..codecs.smooth import ACTIVATIONS
from ..kernels.topk.layout import OVERFLOW
from .common import needs_grad, raise_flag
from .transforms import RazorFunction, differentiable_once


def piecewise_linear(
    x: Tensor, forward: Callable[[Tensor], Tensor], low: float, high: float, inplace: bool = False
) -> Tensor:
    """An activation whose derivative is 1 in (low, high) and 0 elsewhere; ``forward`` computes it (in place where
    ``inplace``).

    NaN passes the gradient, as PyTorch's threshold and hardtanh backward do; a NaN ``high`` means no upper bound.
    """
    if not needs_grad(x):
        out = forward(x)
        remember_activation(out)
        return out
    return _apply(x, forward, pack_derivative(x.detach(), Bits(low, high)), inplace)


def smooth(
    x: Tensor,
    name: str,
    kept: str,
    flag: Tensor,
    inplace: bool = False,
    dense: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """A smooth activation of ``ACTIVATIONS``. ``kept``: "dense", "float16" (the input), or "int8", "int4", "int2" (the
    quantised derivative).

    The forward is PyTorch's own, or ``dense``, another way to compute the same. Under "float16" the gradient is
    PyTorch's at the rounded input; otherwise grad times the stored level.

    Raises:
        TypeError: x is float64, whose derivative is not quantised.
    """
    function, codec = dense or ACTIVATIONS[name].forward, smooth_codec(name, kept)

    def forward(x: Tensor) -> Tensor:
        return x.copy_(function(x)) if inplace else function(x)

    if codec is None or not needs_grad(x):
        out = function(x) if codec is None and needs_grad(x) else forward(x)
        remember_activation(out)
        return out
    if not isinstance(codec, Half) and x.dtype == torch.float64:
        raise TypeError(f"activation={kept!r} has no float64 form: use activation='dense' for double precision")
    copied = isinstance(codec, Half) and inplace and x.element_size() == 2  # or it would change with x
    packed = pack_derivative(x.detach().clone() if copied else x.detach(), codec)
    if isinstance(codec, Half):
        raise_flag(flag, OVERFLOW * torch.isinf(packed.tensors[0]).any())
    return _apply(x, forward, packed, inplace)


def _apply(x: Tensor, forward: Callable[[Tensor], Tensor], packed: Packed, inplace: bool) -> Tensor:
    out = _Activation.run(x, forward, inplace, *packed.arguments)
    remember_activation(out, packed)
    return out


class _Activation(RazorFunction):
    @staticmethod
    def forward(x: Tensor, forward: Callable[[Tensor], Tensor], inplace: bool, form: Form, *stored: Tensor) -> Tensor:
        return forward(x)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        x, _, inplace, form, *stored = inputs
        save(ctx, packed_of(form, stored))
        if inplace:
            ctx.mark_dirty(x)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = load(ctx)
        return times(grad, packed), *(None for _ in ctx.needs_input_grad[1:])
