"""Convolutions of one and three dimensions, and transposed ones, with a pruned input.

``conv.py`` holds the two-dimensional one, which has kernels of its own. Shape legend: B samples, C/D input/output
channels, * positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..codecs import (
    NOTHING,
    Form,
    Packed,
    Pruned,
    Use,
    all_packed_of,
    load,
    pack_shared,
    save,
    source_of_weight,
)
from ..kernels.sealed import sealed, traced
from .common import added, autocast_dtype, cast_to, needs_grad, not_a_view, placed, sample_chunks
from .conv import gradient_shapes
from .transforms import RazorFunction, differentiable_once


class ConvNdSpec(NamedTuple):
    """The settings of a convolution, numbers per dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def conv_nd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: ConvNdSpec,
    dense: Callable[..., Tensor],
    codec: Pruned,
    flag: Tensor,
) -> Tensor:
    """``dense(x, weight, bias)``, the convolution that ``spec`` describes, of x (B, C, *) with weight (D, C / groups,
    *), transposed (C, D / groups, *); backward uses x_hat = unpack(pack(x)) for the weight's gradient.

    The gradient of x is exact. A standardised weight is worked out again from its parameter.
    """
    channels = weight.shape[0] if spec.transposed else weight.shape[1] * spec.groups
    if not needs_grad(x, weight, bias) or x.dim() != weight.dim() or x.shape[1] != channels or not x.numel():
        return dense(x, weight, bias)
    cast = autocast_dtype(x)
    packed = pack_shared(x, codec, Use.of(weight), flag).arguments if weight.requires_grad else NOTHING
    (x,) = cast_to(cast, x)
    source = source_of_weight(weight) if x.requires_grad and not traced() else None
    again = NOTHING if source is None else source.arguments
    return _ConvNd.run(x, weight, bias, spec, dense, cast, *again, *packed)


@sealed(gradient_shapes)
def _gradients(
    grad: Tensor,
    packed: Packed | None,
    shape: tuple[int, ...],
    weight: Tensor,
    spec: ConvNdSpec,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    weight = weight.to(grad.dtype)
    batch, grad_x, grad_weight = len(grad), None, None
    larger = max(math.prod(shape[1:]), grad[:1].numel()) * grad.element_size()
    for start, stop in sample_chunks(batch, larger, grad.device) if need_x or need_weight else ():
        x_hat = grad.new_empty(()).expand(stop - start, *shape[1:])  # its shape is enough for grad_x
        if need_weight:
            x_hat = packed.unpack(start, stop, grad.dtype).view(x_hat.shape)  # of a video frames lie side by side
        part_x, part_weight, _ = torch.ops.aten.convolution_backward(
            grad[start:stop], x_hat, weight, None, *spec, (need_x, need_weight, False)
        )
        if need_x:
            grad_x = placed(grad_x, part_x, start, batch)
        if need_weight:
            grad_weight = added(grad_weight, part_weight, stop - start == batch)
    return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype)


class _ConvNd(RazorFunction):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spec: ConvNdSpec,
        dense: Callable[..., Tensor],
        cast: torch.dtype | None,
        *parts: Form | Tensor | None,
    ) -> Tensor:
        return not_a_view(dense(x, *cast_to(cast, weight, bias)))

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        x, weight, _, ctx.spec, _, _, *parts = inputs
        ctx.shape, ctx.weight_shape = tuple(x.shape), tuple(weight.shape)
        source, packed = all_packed_of(parts)
        save(ctx, weight if source is None else source, packed)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, packed = load(ctx)
        if isinstance(weight, Packed):
            weight = weight.unpack().view(ctx.weight_shape)
        need_x, need_weight, need_bias, *rest = ctx.needs_input_grad
        grad_x, grad_weight = _gradients(grad, packed, ctx.shape, weight, ctx.spec, need_x, need_weight)
        grad_bias = grad.sum((0, *range(2, grad.dim()))) if need_bias else None
        return grad_x, grad_weight, grad_bias, *(None for _ in rest)
