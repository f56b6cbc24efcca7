"""Unpacking: stored values back to their places, zeros elsewhere.

Shape legend: n elements per sample, K kept, T = ceil(n / 256) tiles.
"""

from __future__ import annotations

import numpy
from numba import njit

from ..cpu.arguments import arguments, count_threads, take_tasks
from ..cpu.lanes import cast_load, cast_store, copy_bytes, element_bytes
from ..cpu.layout import BF16, F32
from ..cpu.scalars import (
    get_f32,
    get_i32,
    get_u8,
    get_u16,
    put_f32,
    put_i32,
    put_i64,
    put_u8,
    put_u16,
    trailing_zeros,
)
from ._cpu_form import Form, sample_form
from ._cpu_select import STAGE_AT
from .layout import BITMAP, INT8, NO_INDEX, TILE


@arguments
class Unpack(Form):
    """A packed batch and where it is unpacked to."""

    out: int
    scratch: int
    scratch_bytes: int  # of one thread


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


@njit(forceinline=True)
def _move(kind, stage, i, out, at):
    if kind == F32:
        put_i32(out + at * 4, get_i32(stage + i * 4))
    else:
        put_u16(out + at * 2, get_u16(stage + i * 2))


@njit(forceinline=True)
def _zero(kind, out, start, n):
    """Clear one tile just before its values land: it is still in the first-level cache then."""
    if start + TILE <= n:
        for i in range(TILE * element_bytes(kind) // 8):
            put_i64(out + start * element_bytes(kind) + i * 8, 0)
    else:
        for i in range((n - start) * element_bytes(kind)):
            put_u8(out + start * element_bytes(kind) + i, 0)


@njit(forceinline=True)
def _scatter(kind, value_kind, index_kind, values, scales, index, counts, full, n, keep, out, stage):
    position = 0
    if index_kind == NO_INDEX:
        while position < keep:
            count = min(TILE, keep - position)
            decode_values(kind, value_kind, values, scales, position, count, stage)
            for i in range(count):
                _move(kind, stage, i, out, position + i)
            position += count
        return
    if index_kind == BITMAP:
        for byte in range((n + 7) // 8):
            if byte & 31 == 0:
                _zero(kind, out, byte * 8, n)
            mask = get_u8(index + byte)
            while mask:
                if position & (TILE - 1) == 0:
                    decode_values(kind, value_kind, values, scales, position, min(TILE, keep - position), stage)
                _move(kind, stage, position & (TILE - 1), out, byte * 8 + trailing_zeros(mask))
                position += 1
                mask &= mask - 1
        return
    for tile in range((n + TILE - 1) // TILE):
        count = get_u8(counts + tile) + (((get_u8(full + tile // 8) >> (tile & 7)) & 1) << 8)
        _zero(kind, out, tile * TILE, n)
        for _ in range(count):
            if position & (TILE - 1) == 0:
                decode_values(kind, value_kind, values, scales, position, min(TILE, keep - position), stage)
            _move(kind, stage, position & (TILE - 1), out, tile * TILE + get_u8(index + position))
            position += 1


@njit(forceinline=True)
def unpack_worker(a, kind):
    """Take samples until none is left."""
    batch, n, keep, value_kind, index_kind, out = a.batch, a.n, a.keep, a.value_kind, a.index_kind, a.out
    scratch = a.scratch + count_threads(a, 1) * a.scratch_bytes
    sample = take_tasks(a, 1)
    while sample < batch:
        values, scales, index, counts, full = sample_form(a, sample)
        _scatter(
            kind,
            value_kind,
            index_kind,
            values,
            scales,
            index,
            counts,
            full,
            n,
            keep,
            out + sample * n * element_bytes(kind),
            scratch + STAGE_AT,
        )
        sample = take_tasks(a, 1)
