"""Pooling that keeps shapes, or one byte per output element. Shape legend: B samples, C channels, H/W in, P/Q out."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..codecs import hand_on_activation, mark, save_outputs
from ..codecs.layouts import memory_format
from ..codecs.roles import INDEX
from ..kernels.sealed import sealed
from .common import needs_grad, not_a_view, sample_chunks
from .transforms import RazorFunction, differentiable_once, one_node

Pair = tuple[int, int]


@one_node
def max_pool2d(x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool) -> Tensor:
    """``F.max_pool2d`` of x (B, C, H, W); keeps which element of its window each output is, in 8 bits (a window of at
    most 256 elements)."""
    if not needs_grad(x) or x.dim() not in (3, 4) or kernel[0] * kernel[1] > 256:
        return F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
    out, _ = _MaxPool2d.run(x, kernel, stride, padding, dilation, ceil_mode)
    hand_on_activation(x, out)
    return out


def _corners(shape: torch.Size, stride: Pair, padding: Pair, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row (P, 1) and column (1, Q) of each window's first element."""
    rows = torch.arange(shape[-2], device=device) * stride[0] - padding[0]
    columns = torch.arange(shape[-1], device=device) * stride[1] - padding[1]
    return rows.unsqueeze(1), columns.unsqueeze(0)


def _places(index: Tensor, width: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Where in its window each maximum lies, row * kernel width + column, from its flat index, which is overwritten."""
    top, left = _corners(index.shape, stride, padding, index.device)
    row = index.div(width, rounding_mode="floor")
    column = index.sub_(row * width).sub_(left).div_(dilation[1], rounding_mode="floor")
    return row.sub_(top).div_(dilation[0], rounding_mode="floor").mul_(kernel[1]).add_(column)


def _max_pool_shapes(
    x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    out = F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
    return out, torch.empty_like(out, dtype=torch.uint8)


@sealed(_max_pool_shapes)
def _max_pool_forward(
    x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    settings = (kernel, stride, padding, dilation, ceil_mode)
    out = place = None
    # the wide index, twice in passing, exists for some samples only
    for start, stop in sample_chunks(x.shape[0], 4 * x[:1].numel() * x.element_size(), x.device):
        part, index = F.max_pool2d(x[start:stop], *settings, return_indices=True)
        if out is None:
            shape = (x.shape[0], *part.shape[1:])
            out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
            place = torch.empty_like(out, dtype=torch.uint8)
        out[start:stop] = part
        place[start:stop] = _places(index, x.shape[-1], kernel, stride, padding, dilation)
        del part, index
    if out is None:  # an empty batch
        out = F.max_pool2d(x, *settings)
        place = out.to(torch.uint8)
    return out, place


@sealed(lambda grad, place, shape, *settings: (grad.new_empty(shape),))
def _max_pool_backward(
    grad: Tensor,
    place: Tensor,
    shape: tuple[int, ...],
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
) -> tuple[Tensor]:
    top, left = _corners(grad.shape, stride, padding, grad.device)
    grad_x = grad.new_empty(shape)
    # the wide index, twice in passing, exists for some samples only
    sample_bytes = max(math.prod(shape[1:]) * grad.element_size(), 3 * 8 * place[:1].numel())
    for start, stop in sample_chunks(shape[0], sample_bytes, grad.device):
        at = place[start:stop].long()
        row = top + at.div(kernel[1], rounding_mode="floor") * dilation[0]
        index = row * shape[-1] + left + at % kernel[1] * dilation[1]
        point = grad.new_empty(()).expand(stop - start, *shape[1:])
        grad_x[start:stop] = torch.ops.aten.max_pool2d_with_indices_backward(
            grad[start:stop].contiguous(), point, kernel, stride, padding, dilation, ceil_mode, index
        )
    return (grad_x,)


class _MaxPool2d(RazorFunction):
    @staticmethod
    def forward(
        x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
    ) -> tuple[Tensor, Tensor]:
        out, place = _max_pool_forward(x, kernel, stride, padding, dilation, ceil_mode)
        return out, mark(place, INDEX)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        x, *ctx.settings = inputs
        _, place = output
        ctx.shape = x.shape
        save_outputs(ctx, (place,), place)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        return *_max_pool_backward(grad, place, ctx.shape, *ctx.settings), *(None,) * 5


@one_node
def adaptive_avg_pool2d(x: Tensor, output_size: int | tuple[int | None, int | None]) -> Tensor:
    """``F.adaptive_avg_pool2d``: linear, so backward needs the shape of x alone."""
    if not needs_grad(x):
        return F.adaptive_avg_pool2d(x, output_size)
    return _AdaptiveAvgPool2d.run(x, output_size)


class _AdaptiveAvgPool2d(RazorFunction):
    @staticmethod
    def forward(x: Tensor, output_size: int | tuple[int | None, int | None]) -> Tensor:
        return not_a_view(F.adaptive_avg_pool2d(x, output_size))

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.shape = inputs[0].shape

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        height, width = ctx.shape[-2:]
        if grad.shape[-2:] == (1, 1):
            return (grad / (height * width)).expand(ctx.shape), None
        stand_in = grad.new_empty(()).expand(ctx.shape)
        return torch.ops.aten._adaptive_avg_pool2d_backward(grad.contiguous(), stand_in), None


@one_node
def avg_pool2d(
    x: Tensor, kernel: Pair, stride: Pair, padding: Pair, ceil_mode: bool, count_include_pad: bool, divisor: int | None
) -> Tensor:
    """``F.avg_pool2d``: linear, so backward needs the shape of x alone."""
    settings = (kernel, stride, padding, ceil_mode, count_include_pad, divisor)
    return _AvgPool2d.run(x, settings) if needs_grad(x) else F.avg_pool2d(x, *settings)


class _AvgPool2d(RazorFunction):
    @staticmethod
    def forward(x: Tensor, settings: tuple) -> Tensor:
        return F.avg_pool2d(x, *settings)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        x, ctx.settings = inputs
        ctx.shape = x.shape

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        stand_in = grad.new_empty(()).expand(ctx.shape)
        return torch.ops.aten.avg_pool2d_backward(grad.contiguous(), stand_in, *ctx.settings), None
