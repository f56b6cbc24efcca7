"""Rows to codes and a scale, and back: a thread takes some rows at a time."""

from __future__ import annotations

import numpy
from numba import njit

from ..cpu.counters import count_threads, take_tasks
from ..cpu.lanes import by_kind, cast_load, cast_store, copy_bytes, element_bytes, tail_block, valid_lanes
from ..cpu.layout import F16
from ..cpu.scalars import bits_float, float_bits, get_f32, get_u8, get_u16, put_f32, put_u8, put_u16
from ._cpu_lanes import dequantise, largest_normalised, quantise_normalised
from .cpu import ROWS, SPARE_BYTES

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
def encode_worker(a, kind, bits):
    rows, m, codes = a.rows, a.m, a.codes
    spare = a.scratch + count_threads(a, 1) * SPARE_BYTES
    row_bytes = (m * bits + 7) // 8
    limit = numpy.float32((1 << (bits - 1)) - 1)
    start = take_tasks(a, ROWS)
    while start < rows:
        for row in range(start, min(start + ROWS, rows)):
            at = a.source + row * m * element_bytes(kind)
            mean, rstd = get_f32(a.means + row * 4), get_f32(a.rstds + row * 4)
            largest = 0
            for i in range((m + 15) // 16):
                largest = max(largest, _largest(kind, tail_block(kind, at, m, i, spare), mean, rstd, valid_lanes(m, i)))
            put_f32(spare, bits_float(largest) / limit)
            cast_store(F16, spare, spare + 64)
            put_u16(a.scales + row * 2, get_u16(spare + 64))
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
        start = take_tasks(a, ROWS)


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
def decode_worker(a, kind, bits):
    rows, m, codes, out = a.rows, a.m, a.codes, a.out
    spare = a.scratch + count_threads(a, 1) * SPARE_BYTES
    size = element_bytes(kind)
    row_bytes = (m * bits + 7) // 8
    start = take_tasks(a, ROWS)
    while start < rows:
        for row in range(start, min(start + ROWS, rows)):
            put_u16(spare + 64, get_u16(a.scales + row * 2))
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
        start = take_tasks(a, ROWS)
