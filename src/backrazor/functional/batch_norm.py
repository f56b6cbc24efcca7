"""BatchNorm: frozen statistics keep nothing, batch statistics keep the input by the norm rule. Shape legend: B samples,
C channels, * positions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..codecs import mark
from ..codecs.normalised import NormCodec, NormLayout, keep_normalised, normalised_layout, read_normalised
from ..codecs.roles import DENSE
from .common import needs_grad, sample_chunks, write
from .transforms import differentiable_once


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

    On running statistics it is a scale and a shift a channel: backward multiplies, and nothing of x is kept unless
        ``weight`` is trained. On batch statistics, or for a trained weight, the normalised input is kept by ``codec``
        and stands in for x in the gradient's formula (Ioffe and Szegedy, https://arxiv.org/abs/1502.03167, section 3).
    """
    arguments = (running_mean, running_var, weight, bias, use_batch_statistics, momentum, eps)
    if not needs_grad(x, weight, bias) or x.dim() < 2 or x.shape[1] in (0, x.numel()):  # one value per channel
        return F.batch_norm(x, *arguments)
    keep_input = use_batch_statistics or (weight is not None and weight.requires_grad)
    if keep_input and codec.kind == "dense":
        return F.batch_norm(x, *arguments)
    if not use_batch_statistics:
        layout, packed = None, ()
        if keep_input:
            mean, rstd = running_mean.float(), torch.rsqrt(running_var.float() + eps)
            packed, layout = keep_normalised(x.detach(), mean, rstd, codec, flag)
        return _Frozen.apply(x, weight, bias, running_mean, running_var, eps, layout, *packed)
    out, *_ = _Batch.apply(x, weight, bias, running_mean, running_var, momentum, eps, codec, flag)
    return out


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype).view(1, -1, *(1,) * (x.dim() - 2))


def _sums(grad: Tensor, packed: tuple[Tensor, ...], layout: NormLayout) -> tuple[Tensor, Tensor]:
    """(sum of grad, sum of grad * normalised input) a channel, float32, chunk by chunk."""
    dims = (0, *range(2, grad.dim()))
    plain = grad.new_zeros(grad.shape[1], dtype=torch.promote_types(grad.dtype, torch.float32))
    weighted = torch.zeros_like(plain)
    for start, stop in sample_chunks(grad.shape[0], grad[:1].numel() * grad.element_size(), grad.device):
        part = grad[start:stop]
        normalised = read_normalised(packed, layout, start, stop, grad.dtype)
        plain += part.sum(dims, dtype=plain.dtype)
        weighted += (part * normalised).sum(dims, dtype=plain.dtype)
    return plain, weighted


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        layout: NormLayout | None,
        *packed: Tensor,
    ) -> Tensor:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        _, weight, _, _, running_var, ctx.eps, ctx.layout, *packed = inputs
        ctx.save_for_backward(weight, running_var, *packed)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, running_var, *packed = ctx.saved_tensors
        need_x, need_weight, need_bias, *rest = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if need_x:
            scale = torch.rsqrt(running_var + ctx.eps)
            grad_x = grad * _per_channel(scale if weight is None else scale * weight, grad)
        if need_weight:
            grad_bias, grad_weight = _sums(grad, tuple(packed), ctx.layout)
            grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
        elif need_bias:
            grad_bias = grad.sum((0, *range(2, grad.dim())))
        return grad_x, grad_weight, grad_bias if need_bias else None, *(None for _ in rest)


class _Batch(torch.autograd.Function):
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
        packed, _ = keep_normalised(x, mean.float(), rstd.float(), codec, flag)
        return out, mark(rstd, DENSE, "reciprocal deviation"), *packed

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        x, weight, *_, codec, _ = inputs
        _, rstd, *stored = output
        ctx.layout = normalised_layout(x, x.shape[0] * rstd.numel(), codec)
        ctx.mark_non_differentiable(rstd, *stored)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, rstd, *stored)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, rstd, *packed = ctx.saved_tensors
        need_x, need_weight, need_bias, *rest = ctx.needs_input_grad
        packed = tuple(packed)
        plain, weighted = _sums(grad, packed, ctx.layout)
        grad_x = None
        if need_x:
            count = grad.numel() // max(grad.shape[1], 1)
            scale = _per_channel(rstd if weight is None else rstd * weight, grad)
            offset, slope = _per_channel(plain / count, grad), _per_channel(weighted / count, grad)
            grad_x = torch.empty_like(grad)
            for start, stop in sample_chunks(grad.shape[0], grad[:1].numel() * grad.element_size(), grad.device):
                part = read_normalised(packed, ctx.layout, start, stop, grad.dtype).mul_(slope).add_(offset)
                write(grad_x[start:stop], torch.mul, part.neg_().add_(grad[start:stop]), scale)
        dtype = grad.dtype if weight is None else weight.dtype
        return (
            grad_x,
            weighted.to(dtype) if need_weight else None,
            plain.to(dtype) if need_bias else None,
            *(None for _ in rest),
        )
