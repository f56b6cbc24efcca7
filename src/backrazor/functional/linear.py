"""Linear with a pruned input. Shape legend: B samples, * any leading shape inside a sample, I inputs, O outputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..codecs import NOTHING, Form, LinearProduct, Packed, Pruned, Use, load, pack_shared, packed_of, save
from ..kernels.sealed import sealed, traced
from .common import autocast_dtype, cast_to, needs_grad, not_a_view, sample_chunks, with_product
from .recipes import LinearRecipe, remember_recipe
from .transforms import RazorFunction, differentiable_once, one_node


@one_node
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, codec: Pruned, flag: Tensor) -> Tensor:
    """``F.linear`` of x (B, *, I) with weight (O, I); backward uses x_hat = unpack(pack(x)) for the weight's gradient.

    A one-dimensional x is one sample. The gradient of x is exact.
    """
    if not needs_grad(x, weight, bias) or x.shape[-1:] != weight.shape[-1:]:
        return F.linear(x, weight, bias)
    cast = autocast_dtype(x)
    packed = NOTHING
    if weight.requires_grad:
        packed = pack_shared(x if x.dim() > 1 else x.unsqueeze(0), codec, Use.of(weight), flag).arguments
    (x,) = cast_to(cast, x)
    out = _Linear.run(x, weight, bias, cast, *packed)
    if traced() and x.dim() > 1:
        remember_recipe(out, LinearRecipe(x, weight, bias, cast, packed))
    return out


class _Linear(RazorFunction):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cast: torch.dtype | None,
        form: Form | None,
        *stored: Tensor,
    ) -> Tensor:
        return not_a_view(F.linear(x, *cast_to(cast, weight, bias)))

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        _, weight, _, _, form, *stored = inputs
        save(ctx, weight if ctx.needs_input_grad[0] else None, packed_of(form, stored))

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, packed = load(ctx)
        need_x, need_weight, need_bias, *rest = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if need_x:
            grad_x = torch.matmul(grad, weight.to(grad.dtype))
        if need_weight:
            (grad_weight,) = _weight_gradient(grad, packed)
        if need_bias:
            grad_bias = grad if grad.dim() == 1 else grad.sum(tuple(range(grad.dim() - 1)))
        return grad_x, grad_weight, grad_bias, *(None for _ in rest)


@sealed(lambda grad, packed: (grad.new_empty(grad.shape[-1], packed.form.shape[-1]),))
def _weight_gradient(grad: Tensor, packed: Packed) -> tuple[Tensor]:
    """sum over rows of grad^T x_hat, chunk by chunk into one (O, I) buffer: no (B, O, I) temporary, no dense copy of
    the batch."""
    form = packed.form
    batch, inputs, outputs = form.shape[0], form.shape[-1], grad.shape[-1]
    grad = grad.reshape(batch, math.prod(form.shape[1:-1]), outputs)
    chunks = sample_chunks(batch, form.sample_numel * grad.element_size(), grad.device)
    product = LinearProduct.of(packed, grad)
    if product is not None:
        for start, stop in chunks:
            product.add(grad[start:stop], start, stop)
        return (product.result().to(grad.dtype),)
    total = None
    for start, stop in chunks:
        x_hat = packed.unpack(start, stop, grad.dtype).reshape(-1, inputs)
        total = with_product(total, grad[start:stop].reshape(-1, outputs), x_hat, stop - start == batch)
    return (grad.new_zeros(outputs, inputs) if total is None else total.to(grad.dtype),)
