"""How a product with a packed operand is laid out: what host code, both implementations and the caller agree on.

The weight's gradient of a layer is a sum of products, an element of its input times a vector of the output's gradient.
Of a pruned input few elements are left, and each is one multiplication of a whole vector: a tenth of the arithmetic at
a sparsity of 0.9. For that the vector has to lie contiguous, so the sums are kept as (input, tap, output), the
transpose of the weight, in float32.

Shape legend: C/D input/output channels, k taps of a kernel, I/O inputs/outputs of a Linear.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from ..cpu.layout import LANES


class Window(NamedTuple):
    """A convolution over inputs of ``shape`` (C, H, W), or a depthwise one, then of stride 1. ``padding`` is that of
    the top and of the left; what is padded below and to the right shows in the size of the output."""

    shape: tuple[int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    depthwise: bool


class Masked(NamedTuple):
    """What is added to the packed elements: a guess (B, C) float32 per sample and channel, where a bit of the mask (B,
    ceil(n / 8)) uint8 is set (``bitmask.layout``)."""

    mask: Tensor
    guess: Tensor


class Axis(NamedTuple):
    """Where the taps of a kernel find their gradient along one axis.

    An input at i belongs to class i mod stride; the tap in ``taps`` of that class meets it in the output at i // stride
    + shift, moved by ``border`` so that it is never negative. ``size`` is the length of the gradient with its border of
    zeros.
    """

    taps: tuple[tuple[tuple[int, int], ...], ...]  # by class: (tap, shift + border)
    border: int
    size: int


def axis(length: int, output: int, kernel: int, stride: int, padding: int, dilation: int) -> Axis:
    """The axis of ``length`` inputs and ``output`` outputs: an output at o sees the input o * stride + tap * dilation -
    padding."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(stride)]
    for tap in range(kernel):
        offset = tap * dilation - padding
        found[offset % stride].append((tap, -(offset // stride)))
    shifts = [shift for taps in found for _, shift in taps]
    border = max(0, -min(shifts))
    last = -(-length // stride) - 1 + max(shifts) + border  # the furthest that any element looks
    moved = tuple(tuple((tap, shift + border) for tap, shift in taps) for taps in found)
    return Axis(moved, border, max(border + output, last + 1))


def padded(outputs: int) -> int:
    """``outputs`` rounded up to whole vectors."""
    return -(-outputs // LANES) * LANES


def axes(window: Window, output: tuple[int, int]) -> tuple[Axis, Axis]:
    """Of the height and of the width, for an ``output`` of such a size."""
    lengths = zip(window.shape[1:], output, window.kernel, window.stride, window.padding, window.dilation, strict=True)
    vertical, horizontal = (axis(*numbers) for numbers in lengths)
    return vertical, horizontal


def conv_fits(window: Window, outputs: int, output: tuple[int, int]) -> bool:
    """Whether there is a product for such a window: a sample's positions and offsets have to be 32-bit numbers, and of
    depthwise ones the stride has to be 1 and a row of taps one vector."""
    vertical, horizontal = axes(window, output)
    if window.depthwise:
        return window.stride == (1, 1) and max(lanes_of_taps(window, output)) < LANES
    return _addressable(math.prod(window.shape), vertical.size * horizontal.size, outputs)


def linear_fits(tokens: int, inputs: int, outputs: int) -> bool:
    """The same for (tokens, inputs) -> (tokens, outputs)."""
    return _addressable(tokens * inputs, tokens, outputs)


def _addressable(n: int, rows: int, outputs: int) -> bool:
    return outputs > 0 and n < 2**31 and rows * padded(outputs) * 4 < 2**32


def sums_shape(window: Window, outputs: int) -> tuple[int, ...]:
    """Of the float32 sums for ``outputs`` output channels: (C, taps, padded D); depthwise: (C, rows of taps, 16)."""
    (channels, _, _), (rows, columns) = window.shape, window.kernel
    if window.depthwise:
        return channels, rows, LANES
    return channels, rows * columns, padded(outputs)


def lanes_of_taps(window: Window, output: tuple[int, int]) -> list[int]:
    """Where the sums of a row's taps lie among those of a depthwise row."""
    (taps,) = axes(window, output)[1].taps
    return [lane for _, lane in taps]
