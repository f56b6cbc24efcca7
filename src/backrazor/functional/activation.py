"""Activations: piecewise-linear ones keep one bit per element, smooth ones a quantised derivative or a 16-bit input."""

from __future__ import annotations

import math
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
from ..kernels.sealed import traced
from ..kernels.topk.layout import OVERFLOW
from .common import computed, needs_grad, overwritten, raise_flag, reshaped
from .conv_norm_act import activated_convolution
from .epilogue import Epilogue
from .linear_act import activated_linear
from .recipes import ConvRecipe, recipe_of
from .transforms import RazorFunction, differentiable_once, one_node


def piecewise_linear(
    x: Tensor, forward: Callable[[Tensor], Tensor], low: float, high: float, inplace: bool = False
) -> Tensor:
    """An activation whose derivative is 1 in (low, high) and 0 elsewhere; ``forward`` computes it (in place where
    ``inplace``).

    NaN passes the gradient, as PyTorch's threshold and hardtanh backward do; a NaN ``high`` means no upper bound.
    """
    if torch.compiler.is_dynamo_compiling() or (inplace and traced()):
        return _piecewise_linear_of(x, computed(forward, x, inplace), low, None if math.isnan(high) else high, inplace)
    if not needs_grad(x):
        out = forward(x)
        remember_activation(out)
        return out
    packed = pack_derivative(x.detach(), Bits(low, high))
    fused = _with_recipe(x, packed)
    return _apply(x, forward, packed, inplace) if fused is None else fused


@one_node
def _piecewise_linear_of(x: Tensor, value: Tensor, low: float, high: float | None, inplace: bool) -> Tensor:
    """``piecewise_linear`` where its value is computed; no upper bound is None."""
    high = math.nan if high is None else high
    out = piecewise_linear(x, lambda x: reshaped(value, value.shape), low, high)
    return overwritten(x, out) if inplace else out


def _with_recipe(x: Tensor, packed: Packed) -> Tensor | None:
    """The activation that ``packed`` is kept for, as one operator with what made x, where that is known."""
    recipe, form = recipe_of(x) if traced() else None, packed.form
    if recipe is None or not isinstance(form.codec, Epilogue) or form.format != torch.contiguous_format:
        return None
    if isinstance(recipe, ConvRecipe):
        return activated_convolution(recipe, form.codec)
    return activated_linear(recipe, form.codec)


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
    if dense is not None and torch.compiler.is_dynamo_compiling():
        return _smooth_of(x, computed(dense, x), name, kept, flag, inplace)
    return _smooth(x, name, kept, flag, inplace, dense)


@one_node
def _smooth_of(x: Tensor, value: Tensor, name: str, kept: str, flag: Tensor, inplace: bool) -> Tensor:
    """``smooth`` where its value is computed."""
    return _smooth(x, name, kept, flag, inplace, lambda x: reshaped(value, value.shape))


@one_node
def _smooth(
    x: Tensor, name: str, kept: str, flag: Tensor, inplace: bool, dense: Callable[[Tensor], Tensor] | None
) -> Tensor:
    if inplace and traced():
        return overwritten(x, _smooth(x, name, kept, flag, False, dense))
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
    fused = _with_recipe(x, packed) if dense is None else None
    return _apply(x, forward, packed, inplace) if fused is None else fused


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
