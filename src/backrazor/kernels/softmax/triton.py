"""Softmax backward on CUDA with the dropout mask before it and the scale after it: each tensor is read or written once,
where the unfused operators read or write eight.

A program owns whole rows; a row of up to 4,096 elements stays in registers, a longer one is read twice, the second time
from the cache. A row of a sample need not begin on a whole byte of the mask, so each element looks up its own.

Shape legend: B samples, R rows per sample, m elements per row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import from_float32, launch, to_float32

# (rows per program, elements of a row held at once, warps): the first whose elements hold the row, else the last
CONFIGS = ((32, 64, 4), (8, 256, 4), (2, 1024, 4), (1, 4096, 8))


@triton.jit
def _gradient(grad, bits, row, column, inside, rows_a_sample, mask_row, m, keep_scale, MASKED: tl.constexpr):
    """float32 g of the elements ``column`` of rows ``row``, zero where dropped; a dropped one is not even read."""
    if MASKED:
        sample, within = row // rows_a_sample, row % rows_a_sample
        place = within * m + column
        packed = tl.load(bits + sample * mask_row + place // 8, mask=inside, other=0).to(tl.int32)
        inside = inside & (((packed >> (place % 8).to(tl.int32)) & 1) == 1)
    g = to_float32(tl.load(grad + row * m + column, mask=inside, other=0))
    if MASKED:
        g = to_float32(from_float32(g * keep_scale, grad.dtype.element_ty))
    return g


@triton.jit
def _backward(
    grad,
    p,
    bits,  # read if MASKED
    out,
    rows,
    rows_a_sample,
    mask_row,  # bytes of ``bits`` for each sample
    m,
    keep_scale,
    scale,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    element = tl.arange(0, COLUMNS)[None, :]
    if WHOLE:
        inside = (row < rows) & (element < m)
        g = _gradient(grad, bits, row, element, inside, rows_a_sample, mask_row, m, keep_scale, MASKED)
        probability = to_float32(tl.load(p + row * m + element, mask=inside, other=0))
        total = tl.sum(g * probability, axis=1)[:, None]
        value = from_float32(probability * (g - total) * scale, out.dtype.element_ty)
        tl.store(out + row * m + element, value, mask=inside)
    else:
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, m, COLUMNS):
            inside = (row < rows) & (first + element < m)
            g = _gradient(grad, bits, row, first + element, inside, rows_a_sample, mask_row, m, keep_scale, MASKED)
            sums += g * to_float32(tl.load(p + row * m + first + element, mask=inside, other=0))
        total = tl.sum(sums, axis=1)[:, None]
        for first in range(0, m, COLUMNS):
            inside = (row < rows) & (first + element < m)
            g = _gradient(grad, bits, row, first + element, inside, rows_a_sample, mask_row, m, keep_scale, MASKED)
            probability = to_float32(tl.load(p + row * m + first + element, mask=inside, other=0))
            value = from_float32(probability * (g - total) * scale, out.dtype.element_ty)
            tl.store(out + row * m + first + element, value, mask=inside)


def backward(grad: Tensor, p: Tensor, bits: Tensor | None, keep_scale: float, scale: float) -> Tensor:
    """As ``reference.backward`` up to the order of its sums; all contiguous."""
    out = torch.empty_like(grad)
    if out.numel():
        m = grad.shape[-1]
        rows = grad.numel() // m
        height, columns, warps = next((config for config in CONFIGS if m <= config[1]), CONFIGS[-1])
        constants = {"MASKED": bits is not None, "ROWS": height, "COLUMNS": columns, "WHOLE": m <= columns}
        tensors = grad, p, grad if bits is None else bits, out  # grad stands in for the bits, never read
        sizes = rows, rows // grad.shape[0], 0 if bits is None else bits.shape[1], m, keep_scale, scale
        launch(_backward, -(-rows // height), *tensors, *sizes, **constants, warps=warps)
    return out
