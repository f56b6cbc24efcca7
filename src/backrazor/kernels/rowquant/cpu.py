"""Row-wise quantisation on the CPU: one pass for the row's largest magnitude, one to quantise while the row is in the
cache."""

from __future__ import annotations

import numpy
import torch
from numba import njit
from torch import Tensor

from ..cpu.lanes import (
    BF16,
    F16,
    F32,
    by_kind,
    cast_load,
    cast_store,
    copy_bytes,
    element_bytes,
    tail_block,
    valid_lanes,
)
from ..cpu.launch import launch, threads_for
from ..cpu.scalars import (
    bits_float,
    fetch_add,
    float_bits,
    get_f32,
    get_i64,
    get_u8,
    get_u16,
    put_f32,
    put_u8,
    put_u16,
)
from ..derivative.layout import code_bytes
from ._cpu_lanes import dequantise, largest_normalised, quantise_normalised
from .reference import affine

ROWS = 64  # rows a thread takes at a time
SPARE_BYTES = 192

_largest = by_kind(largest_normalised)
_quantise_4, _quantise_8 = by_kind(quantise_normalised, 4), by_kind(quantise_normalised, 8)
_expand_4, _expand_8 = by_kind(dequantise, 4), by_kind(dequantise, 8)


@njit(forceinline=True)
def _quantise(kind, bits, address, mean, rstd, inverse, to):
    if bits == 4:
        _quantise_4(kind, address, mean, rstd, inverse, to)
    else:
        _quantise_8(kind, address, mean, rstd, inverse, to)


@njit(forceinline=True)
def _expand(kind, bits, codes, scale, to):
    if bits == 4:
        _expand_4(kind, codes, scale, to)
    else:
        _expand_8(kind, codes, scale, to)


@njit(forceinline=True)
def _encode_worker(kind, block):
    """Argument block: counter, slot, rows, m, bits, x, mean, rstd, codes, scales, scratch."""
    rows, m, bits = get_i64(block + 16), get_i64(block + 24), get_i64(block + 32)
    source, means, rstds = get_i64(block + 40), get_i64(block + 48), get_i64(block + 56)
    codes, scales = get_i64(block + 64), get_i64(block + 72)
    spare = get_i64(block + 80) + fetch_add(block + 8, 1) * SPARE_BYTES
    row_bytes = (m * bits + 7) // 8
    limit = numpy.float32((1 << (bits - 1)) - 1)
    start = fetch_add(block, ROWS)
    while start < rows:
        for row in range(start, min(start + ROWS, rows)):
            at = source + row * m * element_bytes(kind)
            mean, rstd = get_f32(means + row * 4), get_f32(rstds + row * 4)
            largest = 0
            for i in range((m + 15) // 16):
                largest = max(largest, _largest(kind, tail_block(kind, at, m, i, spare), mean, rstd, valid_lanes(m, i)))
            put_f32(spare, bits_float(largest) / limit)
            cast_store(F16, spare, spare + 64)
            put_u16(scales + row * 2, get_u16(spare + 64))
            cast_load(F16, spare + 64, spare)
            scale = get_f32(spare)
            usable = (float_bits(scale) & 0x7FFFFFFF) < 0x7F800000 and scale != 0
            inverse = numpy.float32(1.0) / scale if usable else numpy.float32(0.0)
            for i in range((m + 15) // 16):
                to = codes + row * row_bytes + i * 2 * bits
                if i * 16 + 16 <= m:
                    _quantise(kind, bits, at + i * 16 * element_bytes(kind), mean, rstd, inverse, to)
                else:
                    _quantise_tail(kind, bits, at, m, i, mean, rstd, inverse, to, spare)
        start = fetch_add(block, ROWS)


@njit(forceinline=True)
def _quantise_tail(kind, bits, at, m, i, mean, rstd, inverse, to, spare):
    """The last, partial block of a row; an odd number of 4-bit codes leaves the high half of the last byte zero."""
    _quantise(kind, bits, tail_block(kind, at, m, i, spare), mean, rstd, inverse, spare + 64)
    left = (m - i * 16) * bits
    copy_bytes(spare + 64, to, (left + 7) // 8)
    if left % 8:
        last = to + left // 8
        put_u8(last, get_u8(last) & 15)


@njit(forceinline=True)
def _decode_worker(kind, block):
    """Argument block: counter, slot, rows, m, bits, codes, scales, out, scratch."""
    rows, m, bits = get_i64(block + 16), get_i64(block + 24), get_i64(block + 32)
    codes, scales, out = get_i64(block + 40), get_i64(block + 48), get_i64(block + 56)
    spare = get_i64(block + 64) + fetch_add(block + 8, 1) * SPARE_BYTES
    size = element_bytes(kind)
    row_bytes = (m * bits + 7) // 8
    start = fetch_add(block, ROWS)
    while start < rows:
        for row in range(start, min(start + ROWS, rows)):
            put_u16(spare + 64, get_u16(scales + row * 2))
            cast_load(F16, spare + 64, spare)
            scale = get_f32(spare)
            for i in range((m + 15) // 16):
                at = codes + row * row_bytes + i * 2 * bits
                to = out + (row * m + i * 16) * size
                if i * 16 + 16 <= m:
                    _expand(kind, bits, at, scale, to)
                else:
                    copy_bytes(at, spare + 64, ((m - i * 16) * bits + 7) // 8)
                    _expand(kind, bits, spare + 64, scale, spare + 128)
                    copy_bytes(spare + 128, to, (m - i * 16) * size)
        start = fetch_add(block, ROWS)


def _encode_f32(block):
    _encode_worker(F32, block)


def _encode_f16(block):
    _encode_worker(F16, block)


def _encode_bf16(block):
    _encode_worker(BF16, block)


def _decode_f32(block):
    _decode_worker(F32, block)


def _decode_f16(block):
    _decode_worker(F16, block)


def _decode_bf16(block):
    _decode_worker(BF16, block)


_ENCODE = {torch.float32: _encode_f32, torch.float16: _encode_f16, torch.bfloat16: _encode_bf16}
_DECODE = {torch.float32: _decode_f32, torch.float16: _decode_f16, torch.bfloat16: _decode_bf16}


def encode(x: Tensor, mean: Tensor, rstd: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """As ``reference.encode``; x contiguous."""
    rows, m = x.shape
    codes = torch.empty(rows, code_bytes(m, bits), dtype=torch.uint8)
    scales = torch.empty(rows, dtype=torch.float16)
    tasks = -(-rows // ROWS)
    scratch = torch.empty(threads_for(tasks) * SPARE_BYTES, dtype=torch.uint8)
    pointers = [tensor.data_ptr() for tensor in (x, mean, rstd, codes, scales, scratch)]
    launch(_ENCODE[x.dtype], [0, rows, m, bits, *pointers], tasks)
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
    """As ``reference.decode``; codes contiguous."""
    rows = codes.shape[0]
    out = torch.empty(rows, m, dtype=dtype)
    tasks = -(-rows // ROWS)
    scratch = torch.empty(threads_for(tasks) * SPARE_BYTES, dtype=torch.uint8)
    pointers = [tensor.data_ptr() for tensor in (codes, scales, out, scratch)]
    launch(_DECODE[dtype], [0, rows, m, bits, *pointers], tasks)
    return affine(out, weight, bias)
