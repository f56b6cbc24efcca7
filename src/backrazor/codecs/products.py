"""Weight gradients straight from a pruned input, without a dense copy of it.

Of the products that make a weight's gradient only those with a kept element are not zero: at a sparsity of 0.9 a tenth
of the arithmetic of the dense product. Shape legend: B samples, T tokens, I/O inputs/outputs of a Linear, C/D
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
)
from .packed import Packed
from .pruned import PrunedForm

# Above this share of kept elements the dense product is about as fast (benchmarks/products.py).
MOST_KEPT = 0.2
# Below this many tokens or positions of the output there is too little to sum for each weight.
FEWEST_TOKENS = 16
# The convolution library is fast at depthwise kernels of three columns where they see fewer positions than these, and
# slow at wider ones everywhere.
FEWEST_POSITIONS = 28 * 28


def _multiplies(packed: Packed, grad: Tensor) -> bool:
    """Whether the input is pruned, no more of it kept than ``kept_count`` keeps at the sparsity 1 - ``MOST_KEPT``, and
    in types that the kernels multiply."""
    form = packed.form
    if not isinstance(form, PrunedForm) or form.keep > math.ceil(MOST_KEPT * form.sample_numel) + 1:
        return False
    return multiplies_packed(form.stored_dtype, form.index, grad)


class LinearProduct:
    """The gradient of a Linear's weight, summed over calls of ``add``."""

    def __init__(self, packed: Packed, grad: Tensor) -> None:
        self._packed, self._outputs = packed, grad.shape[-1]
        self._sums = grad.new_zeros(packed.form.shape[-1], product_padded(self._outputs), dtype=torch.float32)

    @staticmethod
    def of(packed: Packed, grad: Tensor) -> LinearProduct | None:
        """For a gradient like ``grad`` (B, *, O); None where the dense product is no slower."""
        tokens = math.prod(packed.form.shape[1:-1])
        if tokens < FEWEST_TOKENS or not linear_fits(tokens, packed.form.shape[-1], grad.shape[-1]):
            return None
        return LinearProduct(packed, grad) if _multiplies(packed, grad) else None

    def add(self, grad: Tensor, start: int, stop: int) -> None:
        """``grad`` (stop - start, *, O) is that of these samples."""
        form = self._packed.form
        rows = grad.reshape(stop - start, -1, self._outputs)
        add_linear_product(self._sums, rows, *form.stored(self._packed.tensors, start, stop), form.index)

    def result(self) -> Tensor:
        """(O, I) float32."""
        return product_transposed(self._sums, self._outputs)


class ConvProduct:
    """The gradient of a convolution's weight, summed over calls of ``add``."""

    def __init__(self, packed: Packed, window: Window, grad: Tensor) -> None:
        self._packed, self._window, self._shape = packed, window, grad.shape[1:]
        self._sums = grad.new_zeros(product_sums_shape(window, grad.shape[1]), dtype=torch.float32)

    @staticmethod
    def of(packed: Packed, window: Window, grad: Tensor) -> ConvProduct | None:
        """For a gradient like ``grad`` (B, D, Ho, Wo); None where the dense product is no slower."""
        small = window.depthwise and window.kernel[1] <= 3
        if math.prod(grad.shape[2:]) < (FEWEST_POSITIONS if small else FEWEST_TOKENS):
            return None
        if not conv_fits(window, grad.shape[1], (grad.shape[2], grad.shape[3])):
            return None
        return ConvProduct(packed, window, grad) if _multiplies(packed, grad) else None

    def add(self, grad: Tensor, start: int, stop: int) -> None:
        """``grad`` (stop - start, D, Ho, Wo) is that of these samples."""
        form = self._packed.form
        add_conv_product(self._sums, grad, *form.stored(self._packed.tensors, start, stop), form.index, *self._window)

    def result(self) -> Tensor:
        """(D, C, kh, kw) float32; depthwise (C, 1, kh, kw)."""
        window, outputs = self._window, self._shape[0]
        if window.depthwise:
            return self._sums[:, :, product_lanes(window, tuple(self._shape[1:]))].unsqueeze(1)
        rows = self._sums.flatten(0, 1)
        return product_transposed(rows, outputs).view(outputs, window.shape[0], *window.kernel)
