"""Primitives on tensors, as ``torch.library`` operators with fake implementations, so that shapes and bytes are known
without running them.

Each folder holds ``reference.py`` (plain PyTorch, the definition) and the fast versions, equal to it bit for bit but
for those that sum (product, layernorm, softmax). A primitive sees a sample as a row: (B, n), where row b is sample b in
logical order; those that sum see their operands' shapes. Rows that do not lie contiguously are copied first.

    topk        keep the K largest magnitudes of each sample
    bitmask     one bit an element: the derivative of piecewise-linear functions
    derivative  the quantised derivative of smooth functions
    product     weight gradients straight from what topk packed
    rowquant    normalised rows quantised with a scale each
    layernorm   LayerNorm that packs its output while it is produced, and its backward from the codes
    softmax     the backward of a softmax between a scale and a dropout

The last two exist to save passes over memory on a GPU, where ``fused_norm`` and ``fused_softmax`` say so; their
reference is the arithmetic that PyTorch's own operators do one after another.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from .bitmask import reference as bitmask_reference
from .derivative import reference as derivative_reference
from .dispatch import implementation, triton_by_name
from .layernorm import reference as layernorm_reference
from .layernorm.reference import LONGEST_ROW
from .product import reference as product_reference
from .product.layout import Window, conv_fits, linear_fits
from .product.layout import lanes_of_taps as product_lanes
from .product.layout import padded as product_padded
from .product.layout import sums_shape as product_sums_shape
from .rowquant import reference as rowquant_reference
from .softmax import reference as softmax_reference
from .topk import reference as topk_reference
from .topk.layout import TILE, Stored, allocate, index_bytes

__all__ = [
    "TILE",
    "Stored",
    "Window",
    "add_conv_product",
    "add_linear_product",
    "conv_fits",
    "fused_norm",
    "fused_softmax",
    "index_bytes",
    "level_apply",
    "level_encode",
    "linear_fits",
    "mask_apply",
    "mask_encode",
    "multiplies_packed",
    "norm_backward",
    "norm_forward",
    "product_lanes",
    "product_padded",
    "product_sums_shape",
    "product_transposed",
    "row_decode",
    "row_encode",
    "softmax_backward",
    "topk_pack",
    "topk_unpack",
    "topk_unpack_normalised",
]

_library = torch.library.Library("backrazor", "DEF")


def _operator(schema: str, fake):
    """Define an operator: the decorated function runs on real tensors of any device, ``fake`` gives shapes."""
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def register(function):
        # after a graph break Dynamo would compile the body itself, and the kernels take addresses of its tensors
        opaque = _disable_dynamo(function)
        for key in ("CPU", "CUDA"):
            _library.impl(name, opaque, key)
        torch.library.register_fake(f"backrazor::{name}", fake, lib=_library)
        return getattr(torch.ops.backrazor, name).default

    return register


def _pack_fake(x, keep, values, index, flag):
    batch, n = x.shape[0], 1
    for size in x.shape[1:]:
        n *= size
    return tuple(allocate(batch, n, keep, getattr(torch, values), index, x.device))


@_operator(
    "topk_pack(Tensor x, int keep, str values, str index, Tensor(a!) flag) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _pack_fake,
)
def topk_pack(x: Tensor, keep: int, values: str, index: str, flag: Tensor) -> tuple[Tensor, ...]:
    """Keep the ``keep`` largest magnitudes of each sample of x (B, ...), any strides; see ``Stored``. Sets status bits
    in ``flag`` (int32, one element).

    A sample that does not lie contiguous in logical order is copied, one at a time, so that no dense copy of the batch
    arises.
    """
    stored = Stored(*_pack_fake(x, keep, values, index, flag))
    batch = x.shape[0]
    if batch == 0 or stored.values.numel() == 0:
        return tuple(stored)
    fast = implementation("topk", x)
    dtype = stored.values.dtype
    if fast is not None and (x.dtype == torch.float32 or dtype in (x.dtype, torch.int8)):
        if x.is_contiguous():
            fast.pack(x.view(batch, -1), keep, index, stored, flag)
        else:
            for i in range(batch):
                fast.pack(x[i].contiguous().view(1, -1), keep, index, Stored(*(t[i : i + 1] for t in stored)), flag)
        return tuple(stored)
    *packed, status = topk_reference.pack(x.reshape(batch, -1), keep, values, index)
    if status:
        flag.bitwise_or_(status)
    return tuple(packed)


def _unpack_fake(values, scales, index, counts, full, n, index_kind, dtype):
    return values.new_empty((values.shape[0], n), dtype=dtype)


@_operator(
    "topk_unpack(Tensor values, Tensor scales, Tensor index, Tensor counts, Tensor full, int n, str index_kind, "
    "ScalarType dtype) -> Tensor",
    _unpack_fake,
)
def topk_unpack(
    values: Tensor,
    scales: Tensor,
    index: Tensor,
    counts: Tensor,
    full: Tensor,
    n: int,
    index_kind: str,
    dtype: torch.dtype,
) -> Tensor:
    """The dense (B, n) of ``dtype``: kept values at their places, zero elsewhere. Rows of the stored tensors may be
    sliced beforehand."""
    stored = Stored(values, scales, index, counts, full)
    out = values.new_empty((values.shape[0], n), dtype=dtype)
    if out.numel() == 0:
        return out
    fast = implementation("topk", out)
    if fast is not None and values.dtype != torch.float64:
        fast.unpack(stored, n, index_kind, out)
        return out
    return topk_reference.unpack(*stored, n, index_kind, dtype)


def _unpack_normalised_fake(values, scales, index, counts, full, mean, rstd, n, row, index_kind, dtype):
    return values.new_empty((values.shape[0], n), dtype=dtype)


@_operator(
    "topk_unpack_normalised(Tensor values, Tensor scales, Tensor index, Tensor counts, Tensor full, Tensor mean, "
    "Tensor rstd, int n, int row, str index_kind, ScalarType dtype) -> Tensor",
    _unpack_normalised_fake,
)
def topk_unpack_normalised(
    values: Tensor,
    scales: Tensor,
    index: Tensor,
    counts: Tensor,
    full: Tensor,
    mean: Tensor,
    rstd: Tensor,
    n: int,
    row: int,
    index_kind: str,
    dtype: torch.dtype,
) -> Tensor:
    """``topk_unpack``, then (x_hat - mean) * rstd in float32 or wider, with mean and rstd (B, n / row) float32, a row
    each; (B, n) of ``dtype``."""
    out = values.new_empty((values.shape[0], n), dtype=dtype)
    fast = implementation("topk", out)
    fused = getattr(fast, "unpack_normalised", None)  # Triton's alone
    if out.numel() and fused is not None and values.dtype != torch.float64:
        fused(
            Stored(values, scales, index, counts, full), mean.contiguous(), rstd.contiguous(), n, row, index_kind, out
        )
        return out
    wide = torch.promote_types(dtype, torch.float32)
    x_hat = topk_unpack(values, scales, index, counts, full, n, index_kind, wide)
    return topk_reference.normalise(x_hat, mean, rstd, row).to(dtype)


def _mask_encode_fake(x, low, high):
    return x.new_empty((x.shape[0], (x.shape[1] + 7) // 8), dtype=torch.uint8)


@_operator("mask_encode(Tensor x, float low, float high) -> Tensor", _mask_encode_fake)
def mask_encode(x: Tensor, low: float, high: float) -> Tensor:
    """(B, n) -> uint8 (B, ceil(n / 8)): 1 where not (x <= low or x >= high); a NaN ``high`` means no upper
    bound."""
    x = x.contiguous()
    fast = implementation("bitmask", x)
    return (fast or bitmask_reference).encode(x, low, high)


@_operator("mask_apply(Tensor grad, Tensor bits) -> Tensor", lambda grad, bits: torch.empty_like(grad))
def mask_apply(grad: Tensor, bits: Tensor) -> Tensor:
    """(B, n) and its bits -> grad where the bit is 1, zero elsewhere."""
    grad, bits = grad.contiguous(), bits.contiguous()
    fast = implementation("bitmask", grad)
    return (fast or bitmask_reference).apply(grad, bits)


def _level_encode_fake(x, thresholds, bits):
    return x.new_empty((x.shape[0], (x.shape[1] * bits + 7) // 8), dtype=torch.uint8)


@_operator("level_encode(Tensor x, Tensor thresholds, int bits) -> Tensor", _level_encode_fake)
def level_encode(x: Tensor, thresholds: Tensor, bits: int) -> Tensor:
    """(B, n), thresholds (2^bits - 1,) float32 ascending -> uint8 (B, ceil(n * bits / 8)): how many
    thresholds x reaches."""
    x = x.contiguous()
    fast = implementation("derivative", x)
    return (fast or derivative_reference).encode(x, thresholds, bits)


@_operator(
    "level_apply(Tensor grad, Tensor codes, Tensor levels, int bits) -> Tensor",
    lambda grad, codes, levels, bits: torch.empty_like(grad),
)
def level_apply(grad: Tensor, codes: Tensor, levels: Tensor, bits: int) -> Tensor:
    """(B, n), codes, levels (2^bits,) float32 -> grad times each element's level."""
    grad, codes = grad.contiguous(), codes.contiguous()
    fast = implementation("derivative", grad)
    return (fast or derivative_reference).apply(grad, codes, levels, bits)


def _row_encode_fake(x, mean, rstd, bits):
    return (
        x.new_empty((x.shape[0], (x.shape[1] * bits + 7) // 8), dtype=torch.uint8),
        x.new_empty((x.shape[0],), dtype=torch.float16),
    )


@_operator("row_encode(Tensor x, Tensor mean, Tensor rstd, int bits) -> (Tensor, Tensor)", _row_encode_fake)
def row_encode(x: Tensor, mean: Tensor, rstd: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(R, m), mean and rstd (R,) float32 -> codes uint8 (R, ceil(m * bits / 8)) and scales (R,) float16 of
    (x - mean) * rstd."""
    x, mean, rstd = x.contiguous(), mean.contiguous(), rstd.contiguous()
    fast = implementation("rowquant", x)
    return (fast or rowquant_reference).encode(x, mean, rstd, bits)


def _row_decode_fake(codes, scales, m, bits, dtype, weight=None, bias=None):
    return codes.new_empty((codes.shape[0], m), dtype=dtype)


@_operator(
    "row_decode(Tensor codes, Tensor scales, int m, int bits, ScalarType dtype, Tensor? weight=None, "
    "Tensor? bias=None) -> Tensor",
    _row_decode_fake,
)
def row_decode(
    codes: Tensor,
    scales: Tensor,
    m: int,
    bits: int,
    dtype: torch.dtype,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The normalised rows, (R, m) of ``dtype``, times weight (m,) plus bias (m,) where given."""
    codes, scales = codes.contiguous(), scales.contiguous()
    fast = implementation("rowquant", torch.empty(0, dtype=dtype, device=codes.device))
    return (fast or rowquant_reference).decode(codes, scales, m, bits, dtype, weight, bias)


@_disable_dynamo
def fused_norm(x: Tensor, m: int) -> bool:
    """Whether ``norm_forward`` and ``norm_backward`` are one kernel each for rows of m elements of x's type and device.

    Only where BACKRAZOR_KERNELS asks for Triton by name: its forward sums in another order than PyTorch's, and by
    default every forward equals the dense one to the bit.
    """
    return triton_by_name() and _norm_kernel(x, m) is not None


def _norm_kernel(x: Tensor, m: int) -> ModuleType | None:
    return implementation("layernorm", x) if 0 < m <= LONGEST_ROW else None


def _norm_forward_fake(x, weight, bias, eps, bits):
    codes, scales = _row_encode_fake(x, None, None, bits)
    return torch.empty_like(x), codes, scales, x.new_empty((x.shape[0],), dtype=torch.float32)


@_operator(
    "norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps, int bits) -> (Tensor, Tensor, Tensor, Tensor)",
    _norm_forward_fake,
)
def norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, bits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LayerNorm of x (R, m), weight and bias (m,): out (R, m), and what backward reads: codes and scales
    as ``row_encode`` gives them, rstd (R,) float32."""
    x = x.contiguous()
    fast = _norm_kernel(x, x.shape[1])
    return (fast or layernorm_reference).forward(x, weight, bias, eps, bits)


def _norm_backward_fake(grad, codes, scales, rstd, weight, bits):
    sums = [grad.new_empty((grad.shape[1],), dtype=torch.float32) for _ in range(2)]
    return torch.empty_like(grad), *sums


@_operator(
    "norm_backward(Tensor grad, Tensor codes, Tensor scales, Tensor rstd, Tensor? weight, int bits) -> "
    "(Tensor, Tensor, Tensor)",
    _norm_backward_fake,
)
def norm_backward(
    grad: Tensor, codes: Tensor, scales: Tensor, rstd: Tensor, weight: Tensor | None, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x (R, m), of weight and of bias (m,) float32 from the gradient (R, m) and what ``norm_forward``
    gave."""
    grad, codes, scales, rstd = (part.contiguous() for part in (grad, codes, scales, rstd))
    fast = _norm_kernel(grad, grad.shape[1])
    return (fast or layernorm_reference).backward(grad, codes, scales, rstd, weight, bits)


def fused_softmax(grad: Tensor) -> bool:
    """Whether ``softmax_backward`` is one kernel for a gradient of this type and device."""
    return implementation("softmax", grad) is not None


@_operator(
    "softmax_backward(Tensor grad, Tensor p, Tensor? bits, float keep_scale, float scale) -> Tensor",
    lambda grad, p, bits, keep_scale, scale: torch.empty_like(grad, memory_format=torch.contiguous_format),
)
def softmax_backward(grad: Tensor, p: Tensor, bits: Tensor | None, keep_scale: float, scale: float) -> Tensor:
    """The gradient of the scores (B, *, m) from that of dropout(softmax(scale * scores)) and the softmax
    output p; ``bits`` (B, ceil(* m / 8)) and ``keep_scale`` are the dropout's."""
    grad, p, bits = grad.contiguous(), p.contiguous(), None if bits is None else bits.contiguous()
    fast = implementation("softmax", grad)
    return (fast or softmax_reference).backward(grad, p, bits, keep_scale, scale)


def multiplies_packed(stored: torch.dtype, index: str, grad: Tensor) -> bool:
    """Whether ``add_linear_product`` and ``add_conv_product`` run on the packed form itself, for values of type
    ``stored`` and a gradient like ``grad``, where ``linear_fits`` and ``conv_fits`` are true."""
    return implementation("product", grad) is not None and index != "none" and stored != torch.float64


def _product_kernel(stored: torch.dtype, index: str, grad: Tensor, fits: bool) -> ModuleType:
    fast = implementation("product", grad)
    return fast if fast is not None and fits and multiplies_packed(stored, index, grad) else product_reference


def _product_fake(sums, grad, values, *_):
    return None


@_operator(
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


@_operator(
    "add_conv_product(Tensor(a!) sums, Tensor grad, Tensor values, Tensor scales, Tensor index, Tensor counts, "
    "Tensor full, str index_kind, int[3] shape, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, "
    "bool depthwise) -> ()",
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
    packed x_hat (B, *shape); the fields of ``Window`` follow.

    Raises:
        ValueError: a depthwise window has a stride, or its row of taps needs more than a vector of sums.
    """
    *sizes, depthwise = window
    seen = Window(*(tuple(numbers) for numbers in sizes), depthwise)
    fits = conv_fits(seen, grad.shape[1], (grad.shape[2], grad.shape[3]))
    if depthwise and not fits:
        raise ValueError(f"there is no depthwise product for {seen}: ask conv_fits first")
    product = _product_kernel(values.dtype, index_kind, grad, fits)
    product.conv(sums, grad, Stored(values, scales, index, counts, full), index_kind, seen)


@_operator(
    "product_transposed(Tensor sums, int outputs) -> Tensor",
    lambda sums, outputs: sums.new_empty((outputs, sums.shape[0])),
)
def product_transposed(sums: Tensor, outputs: int) -> Tensor:
    """sums (I, O padded) float32 -> (O, I), contiguous."""
    return (implementation("product", sums) or product_reference).transposed(sums, outputs)
