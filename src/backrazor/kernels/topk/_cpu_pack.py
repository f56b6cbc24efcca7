"""The second pass of packing: values, cast or quantised, and the index, written in order.

Shape legend: n elements per sample, K kept, T = ceil(n / 256) tiles.
"""

from __future__ import annotations

import numpy
from numba import njit

from ..cpu.arguments import arguments, count_threads, take_tasks
from ..cpu.lanes import (
    cast_load,
    cast_store,
    compress_offset,
    copy_bytes,
    element_bytes,
    gather_values,
    magnitude_masks,
    tail_block,
    valid_lanes,
)
from ..cpu.layout import BF16, F16
from ..cpu.scalars import (
    atomic_or,
    bits_float,
    float_bits,
    get_f32,
    get_i32,
    get_u8,
    get_u16,
    popcount,
    put_f32,
    put_i32,
    put_u8,
    put_u16,
    round_even,
    trailing_zeros,
)
from ._cpu_form import Form, sample_form
from ._cpu_select import BUFFER_AT, SPARE_AT, STAGE_AT, threshold_of
from .layout import BITMAP, INT4_LIMIT, INT8, INT8_LIMIT, NON_FINITE, OVERFLOW, TILE, TILES


@arguments
class Pack(Form):
    """A batch and where it is packed to."""

    source: int
    flag: int
    scratch: int
    scratch_bytes: int  # of one thread
    capacity: int  # magnitudes that the buffer behind BUFFER_AT holds


@njit(forceinline=True)
def _lowest_bits(mask, count):
    """The ``count`` lowest set bits of ``mask``."""
    if popcount(mask) <= count:
        return mask
    rest = mask
    for _ in range(count):
        rest &= rest - 1
    return mask & ~rest


@njit(forceinline=True)
def _store_values(value_kind, stage, count, values, scales, position):
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
def _emit(
    kind, value_kind, index_kind, source, n, keep, threshold, ties, stage, spare, values, scales, index, counts, full
):
    """Write the kept values and their index; returns the status bits."""
    status = 0
    staged = 0
    written = 0
    offset_at = 0
    tile_start = 0
    flags = 0
    for block in range((n + 15) // 16):
        address = tail_block(kind, source, n, block, spare)
        valid = valid_lanes(n, block)
        if threshold < 0:
            mask = valid
        else:
            mask, equal = magnitude_masks(kind, address, threshold)
            mask &= valid
            equal &= valid
            if equal and ties:
                equal = _lowest_bits(equal, ties)
                ties -= popcount(equal)
                mask |= equal
        kept = popcount(mask)
        if index_kind == BITMAP:
            put_u8(index + block * 2, mask & 255)
            if block * 16 + 8 < n:
                put_u8(index + block * 2 + 1, mask >> 8)
        elif index_kind == TILES:
            base = (block * 16) & (TILE - 1)
            if offset_at + 16 <= keep:
                compress_offset(base, mask, index + offset_at)
            else:
                rest = mask
                for i in range(kept):
                    put_u8(index + offset_at + i, base + trailing_zeros(rest))
                    rest &= rest - 1
            offset_at += kept
            if base == TILE - 16 or block == (n + 15) // 16 - 1:
                tile = block // (TILE // 16)
                in_tile = offset_at - tile_start
                put_u8(counts + tile, in_tile & 255)
                if in_tile == TILE:
                    flags |= 1 << (tile & 7)
                if (tile & 7) == 7 or block == (n + 15) // 16 - 1:
                    put_u8(full + tile // 8, flags)
                    flags = 0
                tile_start = offset_at
        gather_values(kind, address, mask, stage + staged * 4)
        staged += kept
        if staged >= TILE:
            status |= _store_values(value_kind, stage, TILE, values, scales, written)
            written += TILE
            staged -= TILE
            for i in range(staged):
                put_i32(stage + i * 4, get_i32(stage + (TILE + i) * 4))
    if staged:
        status |= _store_values(value_kind, stage, staged, values, scales, written)
    return status


@njit(forceinline=True)
def pack_worker(a, kind):
    """Take samples until none is left."""
    n, keep = a.n, a.keep
    scratch = a.scratch + count_threads(a, 1) * a.scratch_bytes
    sample = take_tasks(a, 1)
    while sample < a.batch:
        at = a.source + sample * n * element_bytes(kind)
        threshold, ties = -1, 0
        if keep < n:
            threshold, ties = threshold_of(
                kind, at, n, keep, scratch, scratch + BUFFER_AT, a.capacity, scratch + SPARE_AT
            )
        values, scales, index, counts, full = sample_form(a, sample)
        status = _emit(
            kind,
            a.value_kind,
            a.index_kind,
            at,
            n,
            keep,
            threshold,
            ties,
            scratch + STAGE_AT,
            scratch + SPARE_AT,
            values,
            scales,
            index,
            counts,
            full,
        )
        if status:
            atomic_or(a.flag, status)
        sample = take_tasks(a, 1)
