"""Row-wise quantisation on CUDA. A program owns whole rows, so a row's largest magnitude needs no other program.

Rows of up to 4,096 elements stay in registers between the search for the largest and the quantisation: one read. Longer
ones are read twice, the second time from the cache.

Shape legend: R rows, m elements per row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import from_float32, launch, magnitude, quantise, scale_of, to_float32
from ..derivative.layout import code_bytes

# (rows per program, elements of a row held at once, warps): the first whose elements hold the row, else the last
CONFIGS = ((32, 64, 4), (8, 256, 4), (2, 1024, 4), (1, 4096, 8))


@triton.jit
def _normalised(x, row, element, inside, mean, rstd, m):
    return (to_float32(tl.load(x + row * m + element, mask=inside, other=0)) - mean) * rstd


@triton.jit
def store_codes(codes, row, rows, first, value, inverse, inside, m, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    PER: tl.constexpr = 8 // BITS
    LIMIT: tl.constexpr = float(2 ** (BITS - 1) - 1)
    code = tl.where(inside, quantise(value, inverse, LIMIT, LIMIT), 0) & ((1 << BITS) - 1)
    packed = tl.sum(code << (tl.arange(0, PER) * BITS)[None, None, :], axis=2)
    byte = first // PER + tl.arange(0, COLUMNS // PER)[None, :]
    length = (m + PER - 1) // PER
    row = row[:, None]
    tl.store(codes + row * length + byte, packed.to(tl.uint8), mask=(row < rows) & (byte < length))


@triton.jit
def _encode(
    x,
    means,
    rstds,
    codes,
    scales,
    rows,
    m,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    PER: tl.constexpr = 8 // BITS
    LIMIT: tl.constexpr = float(2 ** (BITS - 1) - 1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mean = tl.load(means + row, mask=row < rows, other=0)[:, None, None]
    rstd = tl.load(rstds + row, mask=row < rows, other=0)[:, None, None]
    at = row[:, None, None]
    element = tl.arange(0, COLUMNS // PER)[None, :, None] * PER + tl.arange(0, PER)[None, None, :]
    if WHOLE:
        inside = (at < rows) & (element < m)
        value = _normalised(x, at, element, inside, mean, rstd, m)
        largest = tl.max(tl.max(tl.where(inside, magnitude(value), 0), axis=2), axis=1)
        scale, inverse = scale_of(largest, LIMIT, tl.float16)
        store_codes(codes, row, rows, 0, value, inverse[:, None, None], inside, m, BITS, COLUMNS)
    else:
        largest = tl.zeros((ROWS,), tl.int32)
        for first in range(0, m, COLUMNS):
            inside = (at < rows) & (first + element < m)
            value = _normalised(x, at, first + element, inside, mean, rstd, m)
            largest = tl.maximum(largest, tl.max(tl.max(tl.where(inside, magnitude(value), 0), axis=2), axis=1))
        scale, inverse = scale_of(largest, LIMIT, tl.float16)
        for first in range(0, m, COLUMNS):
            inside = (at < rows) & (first + element < m)
            value = _normalised(x, at, first + element, inside, mean, rstd, m)
            store_codes(codes, row, rows, first, value, inverse[:, None, None], inside, m, BITS, COLUMNS)
    tl.store(scales + row, scale, mask=row < rows)


@triton.jit
def _decode(
    codes,
    scales,
    weight,  # (m,), read if SCALED
    bias,  # (m,), read if SHIFTED
    out,
    rows,
    m,
    SCALED: tl.constexpr,
    SHIFTED: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    PER: tl.constexpr = 8 // BITS
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    scale = to_float32(tl.load(scales + row, mask=row < rows, other=0))[:, None, None]
    length = (m + PER - 1) // PER
    for first in range(0, m, COLUMNS):
        byte = first // PER + tl.arange(0, COLUMNS // PER)[None, :]
        inside = (row[:, None] < rows) & (byte < length)
        packed = tl.load(codes + row[:, None] * length + byte, mask=inside, other=0).to(tl.int32)
        # shifting the code to the top and back down as a signed number extends its sign
        up = (32 - BITS) - (tl.arange(0, PER) * BITS)[None, None, :]
        signed = (packed[:, :, None] << up) >> (32 - BITS)
        element = first + (tl.arange(0, COLUMNS // PER)[None, :, None] * PER + tl.arange(0, PER)[None, None, :])
        value = from_float32(signed.to(tl.float32) * scale, out.dtype.element_ty)
        if SCALED:
            factor = to_float32(tl.load(weight + element, mask=element < m, other=0))
            value = from_float32(to_float32(value) * factor, out.dtype.element_ty)
        if SHIFTED:
            addend = to_float32(tl.load(bias + element, mask=element < m, other=0))
            value = from_float32(to_float32(value) + addend, out.dtype.element_ty)
        tl.store(out + row[:, None, None] * m + element, value, mask=(row[:, None, None] < rows) & (element < m))


def _config(m: int) -> tuple[int, int, int]:
    return next((config for config in CONFIGS if m <= config[1]), CONFIGS[-1])


def encode(x: Tensor, mean: Tensor, rstd: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """As ``reference.encode``; x, mean and rstd contiguous."""
    rows, m = x.shape
    codes = torch.empty(rows, code_bytes(m, bits), dtype=torch.uint8, device=x.device)
    if m == 0:
        return codes, mean.to(torch.float16)
    scales = torch.empty(rows, dtype=torch.float16, device=x.device)
    if rows:
        height, columns, warps = _config(m)
        constants = {"BITS": bits, "ROWS": height, "COLUMNS": columns, "WHOLE": m <= columns}
        launch(_encode, -(-rows // height), x, mean, rstd, codes, scales, rows, m, **constants, warps=warps)
    return codes, scales


def decode(
    codes: Tensor,
    scales: Tensor,
    m: int,
    bits: int,
    dtype: torch.dtype,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """As ``reference.decode``; all contiguous."""
    rows = codes.shape[0]
    out = torch.empty(rows, m, dtype=dtype, device=codes.device)
    if out.numel():
        height, columns, warps = _config(m)
        launch(
            _decode,
            -(-rows // height),
            codes,
            scales,
            codes if weight is None else weight,  # never read
            codes if bias is None else bias,
            out,
            rows,
            m,
            SCALED=weight is not None,
            SHIFTED=bias is not None,
            BITS=bits,
            ROWS=height,
            COLUMNS=columns,
            warps=warps,
        )
    return out
