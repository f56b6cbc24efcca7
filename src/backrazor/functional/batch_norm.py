"""BatchNorm: frozen statistics keep nothing, batch statistics keep the input by the norm rule.

Shape legend: B samples, C channels, * positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..codecs import NOTHING, Form, NormCodec, Packed, load, mark, packed_of, save, save_outputs
from ..codecs.roles import DENSE
from ..kernels.sealed import sealed, traced
from .common import needs_grad, sample_chunks, write
from .conv_norm_act import Norm, normalised_convolution
from .recipes import ConvRecipe, recipe_of
from .transforms import RazorFunction, differentiable_once, one_node


@one_node
def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_batch_statistics: bool,
    momentum: float,
    eps: float,
    codec: NormCodec,
    flag: Tensor,
) -> Tensor:
    """``F.batch_norm`` of x (B, C, *).

    On running statistics it is one scale and one shift per channel: backward multiplies, and nothing of x is kept
    unless ``weight`` is trained. On batch statistics, or for a trained weight, the normalised input is kept by
    ``codec`` and stands for x in the gradient's formula (Ioffe and Szegedy, https://arxiv.org/abs/1502.03167,
    section 3).
    """
    arguments = (running_mean, running_var, weight, bias, use_batch_statistics, momentum, eps)
    if not needs_grad(x, weight, bias) or x.dim() < 2 or x.shape[1] in (0, x.numel()):  # one value per channel
        return F.batch_norm(x, *arguments)
    keep_input = use_batch_statistics or (weight is not None and weight.requires_grad)
    if keep_input and codec.kind == "dense":
        return F.batch_norm(x, *arguments)
    if not use_batch_statistics:
        recipe = (
            recipe_of(x) if traced() and not any(p is not None and p.requires_grad for p in (weight, bias)) else None
        )
        if isinstance(recipe, ConvRecipe):
            out = normalised_convolution(recipe, Norm(running_mean, running_var, weight, bias, eps))
            if out is not None:
                return out
        packed = NOTHING
        if keep_input:
            mean, rstd = running_mean.float(), torch.rsqrt(running_var.float() + eps)
            packed = codec.pack(x.detach(), mean, rstd, flag).arguments
        return _Frozen.run(x, weight, bias, running_mean, running_var, eps, *packed)
    out, *_ = _Batch.run(x, weight, bias, running_mean, running_var, momentum, eps, codec, flag)
    return out


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype).view(1, -1, *(1,) * (x.dim() - 2))


def _sum_shapes(grad: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    plain = grad.new_empty(grad.shape[1], dtype=torch.promote_types(grad.dtype, torch.float32))
    return plain, torch.empty_like(plain)


@sealed(_sum_shapes)
def _sums(grad: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """(sum of grad, sum of grad * normalised input) a channel, float32, chunk by chunk."""
    dims = (0, *range(2, grad.dim()))
    plain = grad.new_zeros(grad.shape[1], dtype=torch.promote_types(grad.dtype, torch.float32))
    weighted = torch.zeros_like(plain)
    for start, stop in sample_chunks(grad.shape[0], grad[:1].numel() * grad.element_size(), grad.device):
        part = grad[start:stop]
        normalised = packed.unpack(start, stop, grad.dtype)
        plain += part.sum(dims, dtype=plain.dtype)
        weighted += (part * normalised).sum(dims, dtype=plain.dtype)
    return plain, weighted


class _Frozen(RazorFunction):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        form: Form | None,
        *stored: Tensor,
    ) -> Tensor:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        _, weight, _, _, running_var, ctx.eps, form, *stored = inputs
        save(ctx, weight, running_var, packed_of(form, stored))

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, running_var, packed = load(ctx)
        need_x, need_weight, need_bias, *rest = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if need_x:
            scale = torch.rsqrt(running_var + ctx.eps)
            grad_x = grad * _per_channel(scale if weight is None else scale * weight, grad)
        if need_weight:
            grad_bias, grad_weight = _sums(grad, packed)
            grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
        elif need_bias:
            grad_bias = grad.sum((0, *range(2, grad.dim())))
        return grad_x, grad_weight, grad_bias if need_bias else None, *(None for _ in rest)


@sealed(lambda grad, packed, scale, plain, weighted: (torch.empty_like(grad),))
def _batch_gradient(grad: Tensor, packed: Packed, scale: Tensor, plain: Tensor, weighted: Tensor) -> tuple[Tensor]:
    count = grad.numel() // max(grad.shape[1], 1)
    scale = _per_channel(scale, grad)
    offset, slope = _per_channel(plain / count, grad), _per_channel(weighted / count, grad)
    grad_x = torch.empty_like(grad)
    for start, stop in sample_chunks(grad.shape[0], grad[:1].numel() * grad.element_size(), grad.device):
        part = packed.unpack(start, stop, grad.dtype).mul_(slope).add_(offset)
        write(grad_x[start:stop], torch.mul, part.neg_().add_(grad[start:stop]), scale)
    return (grad_x,)


class _Batch(RazorFunction):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        codec: NormCodec,
        flag: Tensor,
    ) -> tuple[Tensor, ...]:
        # the operator behind F.batch_norm, called for the statistics it computes on the way
        out, mean, rstd, *_ = torch._batch_norm_impl_index(
            x, weight, bias, running_mean, running_var, True, momentum, eps, torch.backends.cudnn.enabled
        )
        packed = codec.pack(x, mean.float(), rstd.float(), flag)
        return out, mark(rstd, DENSE, "reciprocal deviation"), *packed.tensors

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        x, weight, *_, codec, _ = inputs
        _, rstd, *stored = output
        save_outputs(ctx, output[1:], weight, rstd, packed_of(codec.form(x, x.shape[0] * rstd.numel()), stored))

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, rstd, packed = load(ctx)
        need_x, need_weight, need_bias, *rest = ctx.needs_input_grad
        plain, weighted = _sums(grad, packed)
        grad_x = None
        if need_x:
            scale = rstd if weight is None else rstd * weight
            (grad_x,) = _batch_gradient(grad, packed, scale, plain, weighted)
        dtype = grad.dtype if weight is None else weight.dtype
        return (
            grad_x,
            weighted.to(dtype) if need_weight else None,
            plain.to(dtype) if need_bias else None,
            *(None for _ in rest),
        )
