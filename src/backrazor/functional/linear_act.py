"""Linear and the activation that alone consumes its output, as one operator, a few samples at a time: the first half of
a transformer's MLP.

Separately, forward holds the wide tensor twice and backward its gradient twice. Here it is held once. Shape legend: B
samples, * any inner shape, I inputs, O outputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..codecs import (
    NOTHING,
    Form,
    LinearProduct,
    Packed,
    Pruned,
    Use,
    load,
    pack_shared,
    packed_of,
    remember_activation,
    save_outputs,
    times,
)
from ..kernels.sealed import sealed
from .common import added, autocast_dtype, cast_to, needs_grad, not_a_view, sample_chunks, with_product, write
from .epilogue import Epilogue, activate_, code_shape, encode, joined, packed_epilogue, rounds_by_place
from .recipes import LinearRecipe
from .transforms import RazorFunction, differentiable_once


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, act: Epilogue, codec: Pruned, flag: Tensor) -> Tensor:
    """act(linear(x)) of x (B, *, I), equal to the two operators bit for bit. Keeps x as ``linear`` does and the
    activation's codes."""
    needed = needs_grad(x, weight, bias) and x.shape[-1:] == weight.shape[-1:]
    cast = autocast_dtype(x)
    packed = pack_shared(x, codec, Use.of(weight), flag).arguments if needed and weight.requires_grad else NOTHING
    (x,) = cast_to(cast, x)
    return _run(LinearRecipe(x, weight, bias, cast, packed), act, needed)


def activated_linear(recipe: LinearRecipe, act: Epilogue) -> Tensor:
    """``linear_act`` of what made a Linear's output."""
    return _run(recipe, act, True)


def _run(recipe: LinearRecipe, act: Epilogue, keeps: bool) -> Tensor:
    x, weight, bias, cast, packed = recipe
    out, *codes = _LinearAct.run(x, weight, bias, act, keeps, cast, *packed)
    remember_activation(out, packed_epilogue(codes[0], out.shape, act) if codes else None)
    return out


def _forward_shapes(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: Epilogue, keeps: bool
) -> tuple[Tensor | None, ...]:
    out = x.new_empty(*x.shape[:-1], len(weight))
    return out, x.new_empty(code_shape(out.shape, act), dtype=torch.uint8) if keeps and x.shape[0] else None


@sealed(_forward_shapes)
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: Epilogue, keeps: bool
) -> tuple[Tensor, Tensor | None]:
    # whole, so that the product is the dense one bit for bit
    out = not_a_view(F.linear(x, weight, bias))
    codes, late = [], rounds_by_place(act, math.prod(out.shape[1:]))
    for start, stop in sample_chunks(x.shape[0], out[:1].numel() * out.element_size(), x.device):
        y = out[start:stop]
        if keeps:
            codes.append(encode(y, act))
        if not late:
            activate_(y, act)
    if late:
        activate_(out, act)
    return out, joined(codes, act) if codes else None


def _backward_shapes(
    grad: Tensor,
    weight: Tensor,
    derivative: Packed,
    packed: Packed | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, ...]:
    outputs, inputs = weight.shape
    return (
        grad.new_empty(*grad.shape[:-1], inputs) if need_x else None,
        grad.new_empty(outputs, inputs) if need_weight else None,
        grad.new_empty(outputs) if need_bias else None,
    )


@sealed(_backward_shapes)
def _backward(
    grad: Tensor,
    weight: Tensor,
    derivative: Packed,
    packed: Packed | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, ...]:
    outputs, inputs = weight.shape
    weight = weight.to(grad.dtype)
    grad_x = grad.new_empty(*grad.shape[:-1], inputs) if need_x else None
    product = LinearProduct.of(packed, grad) if need_weight else None
    empty, wide = not len(grad), torch.float32 if grad.element_size() == 2 else grad.dtype
    grad_weight = torch.zeros_like(weight) if need_weight and empty else None
    grad_bias = grad.new_zeros(outputs) if need_bias and empty else None
    for start, stop in sample_chunks(grad.shape[0], math.prod(grad.shape[1:]) * grad.element_size(), grad.device):
        part = times(grad[start:stop], derivative, start, stop)
        rows = part.reshape(-1, outputs)
        if need_x:
            write(grad_x[start:stop], torch.matmul, part, weight)
        if product is not None:
            product.add(part, start, stop)
        elif need_weight:
            x_hat = packed.unpack(start, stop, grad.dtype).reshape(-1, inputs)
            grad_weight = with_product(grad_weight, rows, x_hat, stop - start == len(grad))
        if need_bias:
            grad_bias = added(grad_bias, rows.sum(0, dtype=wide), stop - start == len(grad))
    grad_weight = grad_weight if product is None else product.result()
    return grad_x, *(None if total is None else total.to(grad.dtype) for total in (grad_weight, grad_bias))


class _LinearAct(RazorFunction):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        act: Epilogue,
        keeps: bool,
        cast: torch.dtype | None,
        form: Form | None,
        *stored: Tensor,
    ) -> tuple[Tensor, ...]:
        out, codes = _forward(x, *cast_to(cast, weight, bias), act, keeps)
        return (out,) if codes is None else (out, codes)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        _, weight, _, act, _, _, form, *stored = inputs
        out, *codes = output
        derivative = packed_epilogue(codes[0], out.shape, act) if codes else None
        save_outputs(ctx, codes, weight if codes else None, derivative, packed_of(form, stored))

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, derivative, packed = load(ctx)
        needs = ctx.needs_input_grad
        return *_backward(grad, weight, derivative, packed, *needs[:3]), *(None for _ in needs[3:])
