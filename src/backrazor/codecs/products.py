"""Weight gradients straight from a packed input, without a dense copy of it.

Of the products that make a weight's gradient only those with a kept element are not zero: at a sparsity of 0.9 a tenth
of the arithmetic of the dense product. What a guess per channel or feature adds is that number times a sum of the
output's gradient. Shape legend: B samples, T tokens, I/O inputs/outputs of a Linear, C/D
input/output channels of a convolution.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels import (
    Window,
    add_conv_product,
    add_linear_product,
    conv_fits,
    linear_fits,
    multiplies_packed,
    product_lanes,
    product_padded,
    product_sums_shape,
    product_transposed,
    sums_masks,
)
from ..kernels.dispatch import on_cuda
from .averaged import AveragedForm
from .derivative import Levels
from .guessed import GuessedForm
from .inputs import FAST_COLUMNS
from .packed import Packed
from .pruned import PrunedForm

# Above this share of kept elements the dense product is about as fast (benchmarks/products.py).
MOST_KEPT = 0.2
# Below this many tokens or positions of the output there is too little to sum for each weight.
FEWEST_TOKENS = 16
# The convolution library is fast at depthwise kernels of three columns where they see fewer positions than these.
FEWEST_SPARSE = 28 * 28


def _multiplies(form: PrunedForm, grad: Tensor) -> bool:
    """Whether an input is pruned so that no more of it is kept than ``kept_count`` keeps at the sparsity 1 -
    ``MOST_KEPT``, and in types that the kernels multiply."""
    if form.keep > math.ceil(MOST_KEPT * form.sample_numel) + 1:
        return False
    return multiplies_packed(form.stored_dtype, form.index, grad)


def _sparse(packed: Packed) -> PrunedForm | None:
    """How the kept elements of an input are stored whose x_hat is sparse but for a guess per row, or a mask of it; else
    None."""
    form = packed.form
    if isinstance(form, GuessedForm):
        form = None if isinstance(form.known, Levels) else form.pruned
    return form if isinstance(form, PrunedForm) else None


def _masked(packed: Packed) -> bool:
    """Whether a mask says where the guess holds."""
    return isinstance(packed.form, GuessedForm) and packed.form.masked


class LinearProduct:
    """The gradient of a Linear's weight, summed over calls of ``add``."""

    def __init__(self, packed: Packed, form: PrunedForm, grad: Tensor) -> None:
        self._packed, self._form, self._outputs = packed, form, grad.shape[-1]
        inputs = form.shape[-1]
        self._sums = grad.new_zeros(inputs, product_padded(self._outputs), dtype=torch.float32)
        guesses = isinstance(packed.form, GuessedForm)
        self._guessed = grad.new_zeros(self._outputs, inputs, dtype=torch.float32) if guesses else None

    @staticmethod
    def of(packed: Packed, grad: Tensor) -> LinearProduct | None:
        """For a gradient like ``grad`` (B, *, O); None where the dense product is no slower, or a mask makes it
        one."""
        tokens = math.prod(packed.form.shape[1:-1])
        if tokens < FEWEST_TOKENS or _masked(packed) or not linear_fits(tokens, packed.form.shape[-1], grad.shape[-1]):
            return None
        form = _sparse(packed)
        return LinearProduct(packed, form, grad) if form is not None and _multiplies(form, grad) else None

    def add(self, grad: Tensor, start: int, stop: int) -> None:
        """``grad`` (stop - start, *, O) is that of these samples."""
        form, tensors = self._form, self._packed.tensors
        rows = grad.reshape(stop - start, -1, self._outputs)
        if isinstance(self._packed.form, GuessedForm):
            present = self._packed.form.present(tensors, start, stop, grad.dtype)
            rows = rows if present is None else rows * present
        add_linear_product(self._sums, rows, *form.stored(tensors, start, stop), form.index)
        if self._guessed is not None:  # a number per feature times the sum over the tokens
            guess = self._packed.form.guess(tensors, start, stop)
            self._guessed.addmm_(rows.sum(1, dtype=torch.float32).t(), guess)

    def result(self) -> Tensor:
        """(O, I) float32."""
        product = product_transposed(self._sums, self._outputs)
        return product if self._guessed is None else product.add_(self._guessed)


class ConvProduct:
    """The gradient of a convolution's weight, summed over calls of ``add``."""

    def __init__(self, packed: Packed, form: PrunedForm, window: Window, grad: Tensor) -> None:
        self._packed, self._form, self._window, self._shape = packed, form, window, grad.shape[1:]
        self._sums = grad.new_zeros(product_sums_shape(window, grad.shape[1]), dtype=torch.float32)
        self._guessed = None
        self._masked = _masked(packed)
        if isinstance(packed.form, GuessedForm) and not self._masked:
            shape = grad.shape[1], 1 if window.depthwise else window.shape[0], *window.kernel
            self._guessed = grad.new_zeros(shape, dtype=torch.float32)

    @staticmethod
    def of(packed: Packed, window: Window, grad: Tensor) -> ConvProduct | AveragedProduct | None:
        """For a gradient like ``grad`` (B, D, Ho, Wo); None where the dense product is no slower."""
        if isinstance(packed.form, AveragedForm):
            return AveragedProduct(packed, grad) if _is_pointwise(window) and packed.form.block != (1, 1) else None
        if _masked(packed) and (window.depthwise or not sums_masks()):
            return None
        small = window.depthwise and window.kernel[1] <= FAST_COLUMNS
        if math.prod(grad.shape[2:]) < (FEWEST_SPARSE if small else FEWEST_TOKENS):
            return None
        if not conv_fits(window, grad.shape[1], (grad.shape[2], grad.shape[3])):
            return None
        form = _sparse(packed)
        return ConvProduct(packed, form, window, grad) if form is not None and _multiplies(form, grad) else None

    def add(self, grad: Tensor, start: int, stop: int) -> None:
        """``grad`` (stop - start, D, Ho, Wo) is that of these samples."""
        form, tensors = self._form, self._packed.tensors
        masked = self._packed.form.masked_guess(tensors, start, stop) if self._masked else ()
        add_conv_product(self._sums, grad, *form.stored(tensors, start, stop), form.index, *self._window, *masked)
        if self._guessed is None:
            return
        guess = self._packed.form.guess(tensors, start, stop)
        seen = window_sums(grad, self._window)
        if self._window.depthwise:
            self._guessed.squeeze(1).add_((seen * guess[:, :, None, None]).sum(0))
        else:
            self._guessed.add_(torch.einsum("bdij,bc->dcij", seen, guess))

    def result(self) -> Tensor:
        """(D, C, kh, kw) float32; depthwise (C, 1, kh, kw)."""
        window, outputs = self._window, self._shape[0]
        if window.depthwise:
            product = self._sums[:, :, product_lanes(window, tuple(self._shape[1:]))].unsqueeze(1)
        else:
            rows = self._sums.flatten(0, 1)
            product = product_transposed(rows, outputs).view(outputs, window.shape[0], *window.kernel)
        return product if self._guessed is None else product.add_(self._guessed)


def window_sums(grad: Tensor, window: Window) -> Tensor:
    """(b, D, kh, kw) float32: for each tap, the sum of ``grad`` (b, D, Ho, Wo) over the positions where the tap reads
    the input and not its padding: the weight's gradient for one input channel of ones."""
    height, width = grad.shape[2:]
    rows, columns = (
        [_reading(size, length, tap * dilation - padding, stride) for tap in range(taps)]
        for size, length, taps, stride, padding, dilation in zip(
            (height, width),
            window.shape[1:],
            window.kernel,
            window.stride,
            window.padding,
            window.dilation,
            strict=True,
        )
    )
    lines = _outside_removed(grad, grad.sum(3, dtype=torch.float32), columns, 3)  # (b, D, Ho, kw)
    return _outside_removed(lines, lines.sum(2), rows, 2).transpose(2, 3)  # from (b, D, kw, kh)


def _reading(size: int, length: int, offset: int, stride: int) -> tuple[int, int]:
    """The outputs o of ``size`` for which 0 <= o * stride + offset < ``length``: from, to."""
    first = max(0, -(offset // stride))
    stop = min(size, -(-(length - offset) // stride))
    return min(first, size), max(stop, min(first, size))


def _outside_removed(x: Tensor, total: Tensor, ranges: list[tuple[int, int]], dim: int) -> Tensor:
    """``total``, the sum of x along ``dim``, less what lies outside of each range: a new last dimension of ranges."""
    size = x.shape[dim]
    parts = []
    for first, stop in ranges:
        part = total
        if first > 0:
            part = part - x.narrow(dim, 0, first).sum(dim, dtype=torch.float32)
        if stop < size:
            part = part - x.narrow(dim, stop, size - stop).sum(dim, dtype=torch.float32)
        parts.append(part)
    return torch.stack(parts, -1)


def _is_pointwise(window: Window) -> bool:
    return (window.kernel, window.stride, window.padding) == ((1, 1), (1, 1), (0, 0)) and not window.depthwise


class AveragedProduct:
    """The gradient of a pointwise convolution's weight from averages of its input: they are multiplied with sums of the
    output's gradient over the same blocks, a fraction of the arithmetic."""

    def __init__(self, packed: Packed, grad: Tensor) -> None:
        self._packed = packed
        wide = torch.float32 if grad.element_size() == 2 else grad.dtype
        self._total = grad.new_zeros(grad.shape[1], packed.form.shape[1], dtype=wide)

    def add(self, grad: Tensor, start: int, stop: int) -> None:
        """``grad`` (stop - start, D, H, W) is that of these samples."""
        form, total = self._packed.form, self._total
        averages = form.read_averages(self._packed.tensors, start, stop, total.dtype).flatten(2)
        sums = form.sums(grad).flatten(2)
        if on_cuda(grad.device):  # in two copies and one product, not one product per sample
            total.addmm_(sums.transpose(0, 1).flatten(1), averages.transpose(0, 1).flatten(1).t())
        else:
            total.addbmm_(sums, averages.transpose(1, 2))

    def result(self) -> Tensor:
        """(D, C, 1, 1), float32 for 16 bits."""
        return self._total[:, :, None, None]
