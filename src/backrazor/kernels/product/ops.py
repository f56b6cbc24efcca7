"""Products with a packed operand as operators."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..cpu.target import has_avx512_fp16
from ..dispatch import implementation
from ..operators import operator
from ..topk.layout import Stored
from . import reference
from .layout import Masked, Window, conv_fits, linear_fits


def multiplies_packed(stored: torch.dtype, index: str, grad: Tensor) -> bool:
    """Whether ``add_linear_product`` and ``add_conv_product`` run on the packed form itself, for values of type
    ``stored`` and a gradient like ``grad``, where ``linear_fits`` and ``conv_fits`` are true."""
    return implementation("product", grad) is not None and index != "none" and stored != torch.float64


def sums_masks() -> bool:
    """Whether ``add_conv_product`` under a mask takes less time than unpacking and the dense product: 0.4 to 0.8 of it
    on an AMD EPYC, 1.1 to 2.3 times as long on an Intel Xeon (benchmarks/products.py)."""
    return not has_avx512_fp16()


def _product_kernel(stored: torch.dtype, index: str, grad: Tensor, fits: bool) -> ModuleType:
    fast = implementation("product", grad)
    return fast if fast is not None and fits and multiplies_packed(stored, index, grad) else reference


def _product_fake(sums, grad, values, *_):
    return None


@operator(
    "add_linear_product(Tensor(a!) sums, Tensor grad, Tensor values, Tensor scales, Tensor index, Tensor counts, "
    "Tensor full, str index_kind) -> ()",
    _product_fake,
)
def add_linear_product(
    sums: Tensor,
    grad: Tensor,
    values: Tensor,
    scales: Tensor,
    index: Tensor,
    counts: Tensor,
    full: Tensor,
    index_kind: str,
) -> None:
    """sums (I, O padded to whole vectors) float32 += x_hat^T grad for grad (B, T, O) and the packed x_hat (B, T, I)."""
    fits = linear_fits(grad.shape[1], sums.shape[0], grad.shape[2])
    product = _product_kernel(values.dtype, index_kind, grad, fits)
    product.linear(sums, grad, Stored(values, scales, index, counts, full), index_kind)


@operator(
    "add_conv_product(Tensor(a!) sums, Tensor grad, Tensor values, Tensor scales, Tensor index, Tensor counts, "
    "Tensor full, str index_kind, int[3] shape, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, "
    "bool depthwise, Tensor? mask=None, Tensor? guess=None) -> ()",
    _product_fake,
)
def add_conv_product(
    sums: Tensor,
    grad: Tensor,
    values: Tensor,
    scales: Tensor,
    index: Tensor,
    counts: Tensor,
    full: Tensor,
    index_kind: str,
    *window: Any,
) -> None:
    """sums, shaped as ``product.layout.sums_shape`` says, += the weight's gradient for grad (B, D, Ho, Wo) and the
    packed x_hat (B, *shape); the fields of ``Window`` follow, and behind them perhaps those of ``Masked``, a guess that
    is added to x_hat where a bit of the mask is set.

    Raises:
        ValueError: a depthwise window has a stride or a mask, or its row of taps needs more than a vector of sums.
    """
    fields = len(Window._fields)
    *sizes, depthwise = window[:fields]
    masked = Masked(*window[fields:]) if window[fields:] else None
    seen = Window(*(tuple(numbers) for numbers in sizes), depthwise)
    fits = conv_fits(seen, grad.shape[1], (grad.shape[2], grad.shape[3]))
    if depthwise and not fits:
        raise ValueError(f"there is no depthwise product for {seen}: ask conv_fits first")
    if depthwise and masked is not None:
        raise ValueError("there is no depthwise product with a mask: unpack the input instead")
    product = _product_kernel(values.dtype, index_kind, grad, fits)
    product.conv(sums, grad, Stored(values, scales, index, counts, full), index_kind, seen, masked)


@operator(
    "product_transposed(Tensor sums, int outputs) -> Tensor",
    lambda sums, outputs: sums.new_empty((outputs, sums.shape[0])),
)
def product_transposed(sums: Tensor, outputs: int) -> Tensor:
    """sums (I, O padded) float32 -> (O, I), contiguous."""
    return (implementation("product", sums) or reference).transposed(sums, outputs)
