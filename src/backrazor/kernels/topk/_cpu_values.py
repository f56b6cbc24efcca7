"""Values of up to a tile: cast or quantised for storing, and read back."""

from __future__ import annotations

import numpy
from numba import njit

from ..cpu.lanes import cast_load, cast_store, copy_bytes, element_bytes
from ..cpu.layout import BF16, F16, F32
from ..cpu.scalars import (
    bits_float,
    float_bits,
    get_f32,
    get_i32,
    get_u8,
    get_u16,
    put_f32,
    put_u8,
    put_u16,
    round_even,
)
from .layout import INT4_LIMIT, INT8, INT8_LIMIT, NON_FINITE, OVERFLOW, TILE


@njit(forceinline=True)
def store_values(value_kind, stage, count, values, scales, position):
    """Write ``count`` staged float32 from index ``position`` on, cast or quantised; returns their status bits."""
    status = 0
    largest = largest_finite = 0
    spare = stage + (TILE + 32) * 4
    spill = spare + 64
    for i in range(count):
        bits = get_i32(stage + i * 4) & 0x7FFFFFFF
        largest = max(largest, bits)
        largest_finite = max(largest_finite, bits if bits < 0x7F800000 else 0)
    if largest >= 0x7F800000:
        status |= NON_FINITE
    if value_kind >= INT8:  # or INT4
        limit = numpy.float32(INT8_LIMIT) if value_kind == INT8 else numpy.float32(INT4_LIMIT)
        put_f32(spare, bits_float(largest) / limit)
        cast_store(BF16, spare, spill)
        if get_u16(spill) < 0x0080:  # below the normal numbers its reciprocal is infinite
            put_u16(spill, 0)
        put_u16(scales + (position // TILE) * 2, get_u16(spill))
        cast_load(BF16, spill, spare)
        scale = get_f32(spare)
        infinite = (float_bits(scale) & 0x7FFFFFFF) >= 0x7F800000
        inverse = numpy.float32(0.0) if infinite or scale == 0 else numpy.float32(1.0) / scale
        for i in range(count):
            quantised = numpy.float32(0.0) if infinite else round_even(get_f32(stage + i * 4) * inverse)
            code = int(min(max(quantised, -limit), limit))
            if value_kind == INT8:
                put_u8(values + position + i, code)
            elif i & 1 == 0:
                put_u8(values + (position + i) // 2, code & 15)
            else:
                at = values + (position + i) // 2
                put_u8(at, get_u8(at) | (code & 15) << 4)
        return status
    # 65520 and 2^128 - 2^119: from there on a cast rounds to infinity
    if (value_kind == F16 and largest_finite >= 0x477FF000) or (value_kind == BF16 and largest_finite >= 0x7F7F8000):
        status |= OVERFLOW
    size = element_bytes(value_kind)
    blocks = count // 16
    for block in range(blocks):
        cast_store(value_kind, stage + block * 64, values + (position + block * 16) * size)
    if blocks * 16 < count:
        cast_store(value_kind, stage + blocks * 64, spill)
        copy_bytes(spill, values + (position + blocks * 16) * size, (count - blocks * 16) * size)
    return status


@njit(forceinline=True)
def decode_values(kind, value_kind, values, scales, position, count, stage):
    """Values position .. position + count (at most a tile) as ``kind`` at ``stage``."""
    if value_kind >= INT8:  # or INT4
        spare = stage + (TILE + 32) * 4
        put_u16(spare + 64, get_u16(scales + (position // TILE) * 2))
        cast_load(BF16, spare + 64, spare)
        scale = get_f32(spare)
        if value_kind == INT8:
            for i in range(count):
                put_f32(stage + i * 4, numpy.float32((get_u8(values + position + i) ^ 128) - 128) * scale)
        else:
            for i in range(count):
                code = (get_u8(values + (position + i) // 2) >> (i & 1) * 4) & 15
                put_f32(stage + i * 4, numpy.float32((code ^ 8) - 8) * scale)
    else:
        size = element_bytes(value_kind)
        spill = stage + (TILE + 48) * 4
        for block in range((count + 15) // 16):
            at = values + (position + block * 16) * size
            if block * 16 + 16 > count:  # never read past the end of the values
                copy_bytes(at, spill, (count - block * 16) * size)
                at = spill
            cast_load(value_kind, at, stage + block * 64)
    if kind != F32:
        for block in range(
            (count + 15) // 16
        ):  # in place: block b lands at half its address, behind what is still to be read
            cast_store(kind, stage + block * 64, stage + block * 32)
