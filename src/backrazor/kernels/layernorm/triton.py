"""LayerNorm on CUDA: the output packed while it is produced, and a backward that reads the codes themselves.

A program holds whole rows in registers. Forward reads x once and writes the output, the codes, a scale and a deviation
a row. Backward reads the gradient and the codes once and writes the gradient; no dense copy of the normalised input
ever exists. The sums for weight and bias run over rows that different programs own: each program adds up its rows in
registers and writes one partial row, and PyTorch adds the partial rows. The number of programs follows from the shape
alone, so the sums come out the same in every run, and nothing races.

Shape legend: R rows, m elements per row, P programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import from_float32, launch, magnitude, scale_of, to_float32
from ..derivative.layout import code_bytes
from ..rowquant.triton import store_codes
from .layout import LONGEST_ROW

# (rows per program, elements of a row, warps): the first whose elements hold the row. Eight elements per thread:
# the two sums of backward stay in registers without spills.
CONFIGS = ((4, 256, 4), (1, 1024, 4), (1, 2048, 8), (1, LONGEST_ROW, 16))
SUMMING_PROGRAMS = 512  # of backward: each leaves a row of partial sums


@triton.jit
def _sum(x):
    """Over the last two dimensions, (rows, 1, 1)."""
    return tl.sum(tl.sum(x, axis=2), axis=1)[:, None, None]


@triton.jit
def _forward(
    x,
    weight,  # (m,), read if SCALED
    bias,  # (m,), read if SHIFTED
    out,
    codes,
    scales,
    rstds,
    rows,
    m,
    eps,
    SCALED: tl.constexpr,
    SHIFTED: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    PER: tl.constexpr = 8 // BITS
    LIMIT: tl.constexpr = float(2 ** (BITS - 1) - 1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None, None]
    element = tl.arange(0, COLUMNS // PER)[None, :, None] * PER + tl.arange(0, PER)[None, None, :]
    inside = (at < rows) & (element < m)
    value = to_float32(tl.load(x + at * m + element, mask=inside, other=0))
    length = tl.full((ROWS, 1, 1), 0, tl.float32) + m
    mean = tl.div_rn(_sum(value), length)
    centred = tl.where(inside, value - mean, 0.0)
    variance = tl.div_rn(_sum(centred * centred), length)
    rstd = tl.div_rn(tl.full((ROWS, 1, 1), 1.0, tl.float32), tl.sqrt_rn(variance + eps))
    normalised = centred * rstd
    largest = tl.max(tl.max(tl.where(inside, magnitude(normalised), 0), axis=2), axis=1)
    scale, inverse = scale_of(largest, LIMIT, tl.float16)
    store_codes(codes, row, rows, 0, normalised, inverse[:, None, None], inside, m, BITS, COLUMNS)
    tl.store(scales + row, scale, mask=row < rows)
    tl.store(rstds + at, rstd, mask=at < rows)
    if SCALED:
        normalised = normalised * to_float32(tl.load(weight + element, mask=element < m, other=0))
    if SHIFTED:
        normalised = normalised + to_float32(tl.load(bias + element, mask=element < m, other=0))
    tl.store(out + at * m + element, from_float32(normalised, out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad,
    codes,
    scales,
    rstds,
    weight,  # (m,), read if SCALED
    out,
    weight_sums,  # (P, m) float32
    bias_sums,  # (P, m) float32
    rows,
    m,
    programs,
    SCALED: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    PER: tl.constexpr = 8 // BITS
    program = tl.program_id(0).to(tl.int64)
    byte = tl.arange(0, COLUMNS // PER)
    element = byte[None, :, None] * PER + tl.arange(0, PER)[None, None, :]
    row_bytes = (m + PER - 1) // PER
    weight_sum = tl.zeros((COLUMNS // PER, PER), tl.float32)
    bias_sum = tl.zeros((COLUMNS // PER, PER), tl.float32)
    length = tl.full((ROWS, 1, 1), 0, tl.float32) + m
    for first in range(program * ROWS, rows, tl.cast(programs, tl.int64) * ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)  # the interpreter counts the loop in 32 bits
        at = row[:, None, None]
        inside = (at < rows) & (element < m)
        stored = (row[:, None] < rows) & (byte[None, :] < row_bytes)
        packed = tl.load(codes + row[:, None] * row_bytes + byte[None, :], mask=stored, other=0).to(tl.int32)
        up = (32 - BITS) - (tl.arange(0, PER) * BITS)[None, None, :]  # to the top and back: extends the sign
        signed = (packed[:, :, None] << up) >> (32 - BITS)
        scale = to_float32(tl.load(scales + at, mask=at < rows, other=0))
        z = tl.where(inside, signed.to(tl.float32) * scale, 0.0)
        g = to_float32(tl.load(grad + at * m + element, mask=inside, other=0))
        weight_sum += tl.sum(g * z, axis=0)
        bias_sum += tl.sum(g, axis=0)
        if SCALED:
            g = g * to_float32(tl.load(weight + element, mask=element < m, other=0))
        centred = g - tl.div_rn(_sum(g), length) - z * tl.div_rn(_sum(g * z), length)
        rstd = tl.load(rstds + at, mask=at < rows, other=0)
        tl.store(out + at * m + element, from_float32(centred * rstd, out.dtype.element_ty), mask=inside)
    column = byte[:, None] * PER + tl.arange(0, PER)[None, :]
    place = program * m + column
    tl.store(weight_sums + place, weight_sum, mask=column < m)
    tl.store(bias_sums + place, bias_sum, mask=column < m)


def _config(m: int) -> tuple[int, int, int]:
    return next(config for config in CONFIGS if m <= config[1])


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, bits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``reference.forward`` up to the order of its sums; all contiguous, 0 < m <= ``LONGEST_ROW``."""
    rows, m = x.shape
    out = torch.empty_like(x)
    codes = torch.empty(rows, code_bytes(m, bits), dtype=torch.uint8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float16, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        height, columns, warps = _config(m)
        affine = (x if weight is None else weight), (x if bias is None else bias)  # x stands in, never read
        constants = {"SCALED": weight is not None, "SHIFTED": bias is not None, "BITS": bits}
        constants |= {"ROWS": height, "COLUMNS": columns}
        arguments = x, *affine, out, codes, scales, rstd, rows, m, eps
        launch(_forward, -(-rows // height), *arguments, **constants, warps=warps)
    return out, codes, scales, rstd


def backward(
    grad: Tensor, codes: Tensor, scales: Tensor, rstd: Tensor, weight: Tensor | None, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.backward`` up to the order of its sums; all contiguous, 0 < m <= ``LONGEST_ROW``."""
    rows, m = grad.shape
    out = torch.empty_like(grad)
    height, columns, warps = _config(m)
    programs = min(-(-rows // height), SUMMING_PROGRAMS)
    sums = torch.empty(2, programs, m, dtype=torch.float32, device=grad.device)
    if rows:
        constants = {"SCALED": weight is not None, "BITS": bits, "ROWS": height, "COLUMNS": columns}
        inputs = grad, codes, scales, rstd, grad if weight is None else weight
        launch(_backward, programs, *inputs, out, *sums, rows, m, programs, **constants, warps=warps)
    weight_sum, bias_sum = sums.sum(1)
    return out, weight_sum, bias_sum
