"""Conv2d with a pruned input. Shape legend: B samples, C/D input/output channels, H/W height/width."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..codecs import PackedLayout, Pruned, pack_shared, unpack
from .common import accumulator, autocast_dtype, needs_grad, sample_chunks


class ConvSpec(NamedTuple):
    """The settings of a convolution. ``pad`` (left, right, top, bottom) is applied first by ``F.pad`` in ``pad_mode``; then the plain convolution
    runs with ``padding``, numeric or "same"."""

    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    pad: tuple[int, int, int, int] | None = None
    pad_mode: str = "constant"


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec, codec: Pruned, flag: Tensor) -> Tensor:
    """``F.conv2d`` of x (B, C, H, W) with weight (D, C / groups, kh, kw); backward uses x_hat = unpack(pack(x)) for the weight's gradient.

    The input is packed before padding. The gradient of x is exact.
    """
    if not needs_grad(x, weight, bias):
        return _forward(x, weight, bias, spec)
    cast = autocast_dtype(x)
    layout, packed = None, ()
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    if weight.requires_grad:
        packed, layout = pack_shared(batched, codec, flag)
    if cast is not None:
        batched, weight = batched.to(cast), weight.to(cast)
        bias = None if bias is None else bias.to(cast)
    out = _Conv2d.apply(batched, weight, bias, spec, layout, *packed)
    return out if x.dim() == 4 else out.squeeze(0)


def _pad(x: Tensor, spec: ConvSpec) -> Tensor:
    return x if spec.pad is None else F.pad(x, spec.pad, mode=spec.pad_mode)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    return F.conv2d(_pad(x, spec), weight, bias, spec.stride, spec.padding, spec.dilation, spec.groups)


def _explicit(spec: ConvSpec, kernel: torch.Size) -> ConvSpec:
    """The same convolution with numeric symmetric padding: what is uneven in "same" becomes a zero pad of its own."""
    if spec.padding != "same":
        return spec
    total = [d * (k - 1) for d, k in zip(spec.dilation, kernel, strict=True)]
    if all(t % 2 == 0 for t in total):
        return spec._replace(padding=(total[0] // 2, total[1] // 2))
    (top, left), (bottom, right) = [t // 2 for t in total], [t - t // 2 for t in total]
    return spec._replace(padding=(0, 0), pad=(left, right, top, bottom), pad_mode="constant")


def _padded_backward(grad: Tensor, shape: torch.Size, spec: ConvSpec) -> Tensor:
    """The gradient through ``_pad``. Padding is linear: its transpose is the same at every point."""
    if spec.pad is None:
        return grad
    left, right, top, bottom = spec.pad
    if spec.pad_mode == "constant":
        return grad[..., top : grad.shape[-2] - bottom, left : grad.shape[-1] - right]
    with torch.enable_grad():
        point = grad.new_zeros(shape, requires_grad=True)
        return torch.autograd.grad(_pad(point, spec), point, grad)[0]


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec, layout: PackedLayout | None, *packed: Tensor
    ) -> Tensor:
        ctx.spec, ctx.layout, ctx.shape = _explicit(spec, weight.shape[2:]), layout, x.shape
        ctx.save_for_backward(weight, *packed)
        return _forward(x, weight, bias, spec)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *packed = ctx.saved_tensors
        need_x, need_weight, need_bias, *rest = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if need_x:
            grad_x = _input_gradient(grad, weight, ctx.shape, ctx.spec)
        if need_weight:
            grad_weight = _weight_gradient(grad, weight, tuple(packed), ctx.layout, ctx.spec)
        if need_bias:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias, *(None for _ in rest)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, spec: ConvSpec, mask: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, spec.stride, spec.padding, spec.dilation, False, (0, 0), spec.groups, (*mask, False)
    )[:2]


def _input_gradient(grad: Tensor, weight: Tensor, shape: torch.Size, spec: ConvSpec) -> Tensor:
    """Exact; the convolution's own rule needs only the shape of x, which an expanded scalar gives."""
    batch, channels, height, width = shape
    if spec.pad is not None:
        height, width = height + spec.pad[2] + spec.pad[3], width + spec.pad[0] + spec.pad[1]
    stand_in = grad.new_empty(()).expand(batch, channels, height, width)
    return _padded_backward(_backward(grad, stand_in, weight, spec, (True, False))[0], shape, spec)


def _weight_gradient(grad: Tensor, weight: Tensor, packed: tuple[Tensor, ...], layout: PackedLayout, spec: ConvSpec) -> Tensor:
    """The sum of the chunks' weight gradients at x_hat."""
    chunks = list(sample_chunks(layout.shape[0], layout.sample_numel * grad.element_size()))
    total = None if len(chunks) == 1 else accumulator(tuple(weight.shape), grad)
    for start, stop in chunks:
        x_hat = _pad(unpack(packed, layout, start, stop, grad.dtype), spec)
        part = _backward(grad[start:stop], x_hat, weight, spec, (False, True))[1]
        if total is None:
            return part
        total.add_(part)
    return torch.zeros_like(weight) if total is None else total.to(grad.dtype)
