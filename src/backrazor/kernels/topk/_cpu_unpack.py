"""Unpacking: stored values back to their places, zeros or guesses elsewhere.

Shape legend: n elements per sample, K kept, T = ceil(n / 256) tiles.
"""

from __future__ import annotations

from numba import njit

from ..cpu.counters import count_threads, take_tasks
from ..cpu.lanes import element_bytes
from ..cpu.layout import F32
from ..cpu.scalars import get_f32, get_i32, get_u8, get_u16, put_f32, put_i32, put_i64, put_u8, put_u16, trailing_zeros
from ..guess._cpu_form import NO_GUESS
from ..guess._cpu_guess import add_half, fill_tile
from ..guess._cpu_read import read_guess
from ._cpu_form import SPARE_AT, STAGE_AT
from ._cpu_sample import sample_form
from ._cpu_values import decode_values
from .layout import BITMAP, NO_INDEX, TILE


@njit(forceinline=True)
def _move(kind, fill, stage, i, out, at, spare):
    """Put a value to its place, on top of what is guessed there."""
    if kind == F32:
        if fill != NO_GUESS:
            put_f32(out + at * 4, get_f32(out + at * 4) + get_f32(stage + i * 4))
        else:
            put_i32(out + at * 4, get_i32(stage + i * 4))
    elif fill != NO_GUESS:
        add_half(kind, stage + i * 2, out + at * 2, spare)
    else:
        put_u16(out + at * 2, get_u16(stage + i * 2))


@njit(forceinline=True)
def _prepare(kind, fill, guess, bits, out, start, n, spare):
    """Clear one tile, or write its guesses, just before its values land: it is still in the first-level cache then."""
    if fill != NO_GUESS:
        fill_tile(kind, fill, guess, bits, start, n, out, spare)
    elif start + TILE <= n:
        for i in range(TILE * element_bytes(kind) // 8):
            put_i64(out + start * element_bytes(kind) + i * 8, 0)
    else:
        for i in range((n - start) * element_bytes(kind)):
            put_u8(out + start * element_bytes(kind) + i, 0)


@njit(forceinline=True)
def _scatter(
    kind, fill, guess, bits, value_kind, index_kind, values, scales, index, counts, full, n, keep, out, stage, spare
):
    position = 0
    if index_kind == NO_INDEX:
        while position < keep:
            count = min(TILE, keep - position)
            decode_values(kind, value_kind, values, scales, position, count, stage)
            if fill != NO_GUESS:
                fill_tile(kind, fill, guess, bits, position, n, out, spare)
            for i in range(count):
                _move(kind, fill, stage, i, out, position + i, spare)
            position += count
        return
    if index_kind == BITMAP:
        for byte in range((n + 7) // 8):
            if byte & 31 == 0:
                _prepare(kind, fill, guess, bits, out, byte * 8, n, spare)
            mask = get_u8(index + byte)
            while mask:
                if position & (TILE - 1) == 0:
                    decode_values(kind, value_kind, values, scales, position, min(TILE, keep - position), stage)
                _move(kind, fill, stage, position & (TILE - 1), out, byte * 8 + trailing_zeros(mask), spare)
                position += 1
                mask &= mask - 1
        return
    for tile in range((n + TILE - 1) // TILE):
        count = get_u8(counts + tile) + (((get_u8(full + tile // 8) >> (tile & 7)) & 1) << 8)
        _prepare(kind, fill, guess, bits, out, tile * TILE, n, spare)
        for _ in range(count):
            if position & (TILE - 1) == 0:
                decode_values(kind, value_kind, values, scales, position, min(TILE, keep - position), stage)
            _move(kind, fill, stage, position & (TILE - 1), out, tile * TILE + get_u8(index + position), spare)
            position += 1


@njit(forceinline=True)
def unpack_worker(a, kind, fill):
    """Take samples until none is left."""
    batch, n, keep, value_kind, index_kind, out = a.batch, a.n, a.keep, a.value_kind, a.index_kind, a.out
    scratch = a.scratch + count_threads(a, 1) * a.scratch_bytes
    sample = take_tasks(a, 1)
    while sample < batch:
        values, scales, index, counts, full = sample_form(a, sample)
        stage, spare = scratch + STAGE_AT, scratch + SPARE_AT
        _scatter(
            kind,
            fill,
            read_guess(a, fill, sample, scratch, 0.0, 0.0, stage, spare),
            a.bits + sample * ((n + 7) // 8) if a.bits else 0,
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
            stage,
            spare,
        )
        sample = take_tasks(a, 1)
