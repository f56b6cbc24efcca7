"""RMSNorm that keeps its input by the norm rule. Shape legend: B samples, * any inner shape, D normalised elements."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..codecs import AffineForm, NormCodec, Packed, load, mark, packed_of, remember_source, save_outputs
from ..codecs.roles import DENSE
from ..kernels.sealed import sealed
from .common import accumulator, computed, needs_grad, reshaped, sample_chunks, write
from .layer_norm import has_rows
from .transforms import RazorFunction, differentiable_once, one_node


def rms_norm(
    x: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    eps: float | None,
    codec: NormCodec,
    flag: Tensor,
    dense: Callable[[Tensor], Tensor] | None = None,
    offset: float = 0.0,
) -> Tensor:
    """``F.rms_norm`` of x (B, *, D...) over its last dimensions ``shape``; an ``eps`` of None is that of x's type.

    Keeps h = x * rstd by ``codec`` and rstd, a reciprocal root mean square per row. With g the gradient times
    ``weight``, the gradient of x is rstd * (g - h * mean(g * h)), means over D (Zhang and Sennrich,
    https://arxiv.org/abs/1910.07467). Under int8 and int4 the output carries a note that layers reading it directly may
    use h * weight instead of packing it again.

    ``dense`` is another way to compute the same, with roundings of its own: the forward is what it gives. ``offset`` is
    added to ``weight`` first.
    """
    if dense is not None and torch.compiler.is_dynamo_compiling():
        return _rms_norm_of(x, computed(dense, x), shape, weight, eps, codec, flag, offset)
    return _rms_norm(x, shape, weight, eps, codec, flag, dense, offset)


@one_node
def _rms_norm_of(
    x: Tensor,
    value: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    eps: float | None,
    codec: NormCodec,
    flag: Tensor,
    offset: float,
) -> Tensor:
    """``rms_norm`` where its value is computed."""
    return _rms_norm(x, shape, weight, eps, codec, flag, lambda x: reshaped(value, value.shape), offset)


@one_node
def _rms_norm(
    x: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    eps: float | None,
    codec: NormCodec,
    flag: Tensor,
    dense: Callable[[Tensor], Tensor] | None,
    offset: float,
) -> Tensor:
    if dense is None:
        dense = partial(F.rms_norm, normalized_shape=shape, weight=weight, eps=eps)
    if not needs_grad(x, weight) or codec.kind == "dense" or not has_rows(x, shape):
        return dense(x)
    out, rstd, *stored = _RMSNorm.run(x, weight, tuple(shape), eps, codec, flag, dense, offset)
    if codec.bits is not None:
        scale = weight.detach() + offset if offset else weight
        affine = () if weight is None else (scale,)
        form = AffineForm(codec.form(x, rstd.numel()), out.dtype, weight is not None, False)
        remember_source(out, Packed((*stored, *affine), form))
    return out


def _gradient_shapes(
    grad: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    packed: Packed,
    shape: tuple[int, ...],
    offset: float,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    dtype = grad.dtype if weight is None else weight.dtype
    return torch.empty_like(grad) if need_x else None, grad.new_empty(shape, dtype=dtype) if need_weight else None


@sealed(_gradient_shapes)
def _gradients(
    grad: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    packed: Packed,
    shape: tuple[int, ...],
    offset: float,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    dims = tuple(range(-len(shape), 0))
    total = accumulator(shape, grad) if need_weight else None
    grad_x = torch.empty_like(grad, memory_format=torch.contiguous_format) if need_x else None
    for start, stop in sample_chunks(grad.shape[0], grad[:1].numel() * grad.element_size(), grad.device):
        part, h = grad[start:stop], packed.unpack(start, stop, grad.dtype)
        if total is not None:
            total.add_((part * h).sum_to_size(total.shape).to(total.dtype))
        if grad_x is not None:
            g = part if weight is None else part * (weight + offset if offset else weight)
            slope = (g * h).mean(dims, keepdim=True)
            write(grad_x[start:stop], torch.mul, g - h.mul_(slope), rstd[start:stop].to(grad.dtype))
    return grad_x, None if total is None else total.to(grad.dtype if weight is None else weight.dtype)


class _RMSNorm(RazorFunction):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        shape: tuple[int, ...],
        eps: float | None,
        codec: NormCodec,
        flag: Tensor,
        dense: Callable[[Tensor], Tensor],
        offset: float,
    ) -> tuple[Tensor, ...]:
        dims = tuple(range(-len(shape), 0))
        square = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        count = x.numel() // max(square.numel(), 1)
        rstd = torch.rsqrt(square.square() / max(count, 1) + (torch.finfo(x.dtype).eps if eps is None else eps)).float()
        stored = codec.pack(x, torch.zeros_like(rstd).flatten(1), rstd.flatten(1), flag).tensors
        return dense(x), mark(rstd, DENSE, "reciprocal root mean square"), *stored

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        x, weight, ctx.normalised_shape, _, codec, _, _, ctx.offset = inputs
        _, rstd, *stored = output
        save_outputs(ctx, output[1:], weight, rstd, packed_of(codec.form(x, rstd.numel()), stored))

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, rstd, packed = load(ctx)
        need_x, need_weight, *rest = ctx.needs_input_grad
        gradients = _gradients(grad, weight, rstd, packed, ctx.normalised_shape, ctx.offset, need_x, need_weight)
        return *gradients, *(None for _ in rest)
