"""Unpacking: stored values back to their places, zeros elsewhere.

Shape legend: n elements a sample, K kept, T = ceil(n / 256) tiles.
"""

from __future__ import annotations

import numpy
from numba import njit

from ..cpu.lanes import (
    BF16,
    F16,
    F32,
    cast_load,
    cast_store,
    copy_bytes,
    element_bytes,
)
from ..cpu.scalars import (
    fetch_add,
    get_f32,
    get_i32,
    get_i64,
    get_u8,
    get_u16,
    put_f32,
    put_i32,
    put_i64,
    put_u8,
    put_u16,
    trailing_zeros,
)
from ._cpu_select import INT8, STAGE_AT
from .layout import BITMAP, NO_INDEX, TILE


@njit(forceinline=True)
def decode_values(kind, value_kind, values, scales, position, count, stage):
    """Values position .. position + count (at most a tile) as ``kind`` at ``stage``."""
    if value_kind == INT8:
        spare = stage + (TILE + 32) * 4
        put_u16(spare + 64, get_u16(scales + (position // TILE) * 2))
        cast_load(BF16, spare + 64, spare)
        scale = get_f32(spare)
        for i in range(count):
            put_f32(stage + i * 4, numpy.float32((get_u8(values + position + i) ^ 128) - 128) * scale)
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
def _unpack_worker(kind, block):
    """Take samples from the shared counter until none is left. The argument block is laid out by ``unpack``."""
    batch, n, keep = get_i64(block + 16), get_i64(block + 24), get_i64(block + 32)
    value_kind, index_kind = get_i64(block + 40), get_i64(block + 48)
    out, values, scales = get_i64(block + 56), get_i64(block + 64), get_i64(block + 72)
    index, counts, full = get_i64(block + 80), get_i64(block + 88), get_i64(block + 96)
    index_stride = get_i64(block + 120)
    scratch = get_i64(block + 104) + fetch_add(block + 8, 1) * get_i64(block + 112)
    tiles = (n + TILE - 1) // TILE
    value_bytes = 1 if value_kind == INT8 else element_bytes(value_kind)
    sample = fetch_add(block, 1)
    while sample < batch:
        _scatter(
            kind,
            value_kind,
            index_kind,
            values + sample * keep * value_bytes,
            scales + sample * ((keep + TILE - 1) // TILE) * 2,
            index + sample * index_stride,
            counts + sample * tiles,
            full + sample * ((tiles + 7) // 8),
            n,
            keep,
            out + sample * n * element_bytes(kind),
            scratch + STAGE_AT,
        )
        sample = fetch_add(block, 1)


def unpack_f32(block):
    _unpack_worker(F32, block)


def unpack_f16(block):
    _unpack_worker(F16, block)


def unpack_bf16(block):
    _unpack_worker(BF16, block)
