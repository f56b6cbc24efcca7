"""Pooling that keeps shapes, or one byte per output element. Shape legend: B samples, C channels, T/H/W in."""

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
Sizes = tuple[int, ...]  # of each spatial dimension, two or three

MOST_PLACES = 256  # of a window, for one byte
_FORWARD = {2: F.max_pool2d, 3: F.max_pool3d}
_BACKWARD = {2: torch.ops.aten.max_pool2d_with_indices_backward, 3: torch.ops.aten.max_pool3d_with_indices_backward}


@one_node
def max_pool(x: Tensor, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, ceil_mode: bool) -> Tensor:
    """``F.max_pool2d`` of x (B, C, H, W) or ``F.max_pool3d`` of x (B, C, T, H, W), by the sizes in ``kernel``; keeps
    which element of its window each output is, in 8 bits (a window of at most 256 elements)."""
    dims = len(kernel)
    if not needs_grad(x) or x.dim() not in (dims + 1, dims + 2) or math.prod(kernel) > MOST_PLACES:
        return _FORWARD[dims](x, kernel, stride, padding, dilation, ceil_mode)
    out, _ = _MaxPool.run(x, kernel, stride, padding, dilation, ceil_mode)
    hand_on_activation(x, out)
    return out


def _along(values: Tensor, dim: int, dims: int) -> Tensor:
    """(n,) as what varies along the spatial dimension ``dim`` of ``dims``."""
    return values.view(-1, *(1,) * (dims - 1 - dim))


def _corners(shape: Sizes, stride: Sizes, padding: Sizes, device: torch.device) -> list[Tensor]:
    """Where each window begins, per spatial dimension, for outputs of ``shape`` (..., *)."""
    dims = len(stride)
    starts = zip(shape[-dims:], stride, padding, strict=True)
    return [
        _along(torch.arange(size, device=device) * step - border, dim, dims)
        for dim, (size, step, border) in enumerate(starts)
    ]


def _places(index: Tensor, shape: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> Tensor:
    """Where in its window each maximum lies, row by row, from its flat index among inputs of ``shape``."""
    dims = len(kernel)
    corners = _corners(index.shape, stride, padding, index.device)
    place, weight = None, 1
    for dim in reversed(range(dims)):
        rest = index.div(shape[dim - dims], rounding_mode="floor") if dim else None
        at = index if rest is None else index.sub_(rest * shape[dim - dims])
        at = at.sub_(corners[dim]).div_(dilation[dim], rounding_mode="floor").mul_(weight)
        place = at if place is None else place.add_(at)
        index, weight = rest, weight * kernel[dim]
    return place


def _positions(place: Tensor, shape: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> Tensor:
    """The inverse of ``_places``."""
    dims = len(kernel)
    corners = _corners(place.shape, stride, padding, place.device)
    place, index, weight = place.long(), None, 1
    for dim in reversed(range(dims)):
        at = ((place % kernel[dim] if dim else place) * dilation[dim] + corners[dim]) * weight
        index = at if index is None else index.add_(at)
        place, weight = place.div(kernel[dim], rounding_mode="floor"), weight * shape[dim - dims]
    return index


def _max_pool_shapes(
    x: Tensor, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    out = _FORWARD[len(kernel)](x, kernel, stride, padding, dilation, ceil_mode)
    return out, torch.empty_like(out, dtype=torch.uint8)


@sealed(_max_pool_shapes)
def _max_pool_forward(
    x: Tensor, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    pool, settings = _FORWARD[len(kernel)], (kernel, stride, padding, dilation, ceil_mode)
    out = place = None
    # the wide index, twice in passing, exists for some samples only
    for start, stop in sample_chunks(x.shape[0], 4 * x[:1].numel() * x.element_size(), x.device):
        part, index = pool(x[start:stop], *settings, return_indices=True)
        if out is None:
            shape = (x.shape[0], *part.shape[1:])
            out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(part))
            place = torch.empty_like(out, dtype=torch.uint8)
        out[start:stop] = part
        place[start:stop] = _places(index, x.shape, kernel, stride, padding, dilation)
        del part, index
    if out is None:  # an empty batch
        out = pool(x, *settings)
        place = out.to(torch.uint8)
    return out, place


@sealed(lambda grad, place, shape, *settings: (grad.new_empty(shape),))
def _max_pool_backward(
    grad: Tensor,
    place: Tensor,
    shape: Sizes,
    kernel: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    ceil_mode: bool,
) -> tuple[Tensor]:
    grad_x = grad.new_empty(shape)
    # the wide index, twice in passing, exists for some samples only
    sample_bytes = max(math.prod(shape[1:]) * grad.element_size(), 3 * 8 * place[:1].numel())
    for start, stop in sample_chunks(shape[0], sample_bytes, grad.device):
        index = _positions(place[start:stop], shape, kernel, stride, padding, dilation)
        point = grad.new_empty(()).expand(stop - start, *shape[1:])
        grad_x[start:stop] = _BACKWARD[len(kernel)](
            grad[start:stop].contiguous(), point, kernel, stride, padding, dilation, ceil_mode, index
        )
    return (grad_x,)


class _MaxPool(RazorFunction):
    @staticmethod
    def forward(
        x: Tensor, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, ceil_mode: bool
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
