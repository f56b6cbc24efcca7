"""The second pass of packing: values, cast or quantised, and the index, written in order.

Shape legend: n elements per sample, K kept, T = ceil(n / 256) tiles.
"""

from __future__ import annotations

from numba import njit

from ..cpu.counters import count_threads, take_tasks
from ..cpu.lanes import compress_offset, element_bytes, gather_values, magnitude_masks, valid_lanes
from ..cpu.scalars import atomic_or, get_i32, popcount, put_i32, put_u8, trailing_zeros
from ..guess._cpu_form import NO_GUESS, SLACK
from ..guess._cpu_guess import block_at
from ..guess._cpu_means import sample_factors, sample_means
from ..guess._cpu_read import read_guess, sample_codes, unread_guess
from ._cpu_form import BUFFER_AT, SPARE_AT, STAGE_AT
from ._cpu_sample import sample_form
from ._cpu_select import threshold_of
from ._cpu_values import store_values
from .layout import BITMAP, INT8, TILE, TILES


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
def _emit(
    kind,
    fill,
    guess,
    value_kind,
    index_kind,
    source,
    n,
    keep,
    threshold,
    ties,
    stage,
    spare,
    values,
    scales,
    index,
    counts,
    full,
):
    """Write the kept values and their index; returns the status bits."""
    status = 0
    staged = 0
    written = 0
    offset_at = 0
    tile_start = 0
    flags = 0
    for block in range((n + 15) // 16):
        address = block_at(kind, fill, guess, source, n, block, spare)
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
            status |= store_values(value_kind, stage, TILE, values, scales, written)
            written += TILE
            staged -= TILE
            for i in range(staged):
                put_i32(stage + i * 4, get_i32(stage + (TILE + i) * 4))
    if staged:
        status |= store_values(value_kind, stage, staged, values, scales, written)
    return status


@njit(forceinline=True)
def _store_guess(a, kind, source, sample, scratch):
    """Write the codes and scales of a sample's guesses; returns the status bits."""
    status = 0
    guess = unread_guess(a, sample, scratch, a.low, a.high)
    numbers, stage, spare = guess.table, scratch + STAGE_AT, scratch + SPARE_AT
    second = numbers + (a.rows + SLACK) * 4
    if guess.bits:
        sample_factors(kind, a.features, a.rows, source, a.n, guess, numbers, second, spare)
    else:
        sample_means(kind, a.features, a.rows, source, a.n, guess.low, guess.high, numbers, second, spare)
    codes, scales = sample_codes(a, sample)
    for start in range(0, a.rows, TILE):
        count = min(TILE, a.rows - start)
        for i in range(count):
            put_i32(stage + i * 4, get_i32(numbers + (start + i) * 4))
        status |= store_values(INT8, stage, count, codes, scales, start)
    return status


@njit(forceinline=True)
def pack_worker(a, kind, fill):
    """Take samples until none is left."""
    n, keep = a.n, a.keep
    scratch = a.scratch + count_threads(a, 1) * a.scratch_bytes
    stage, spare = scratch + STAGE_AT, scratch + SPARE_AT
    sample = take_tasks(a, 1)
    while sample < a.batch:
        at = a.source + sample * n * element_bytes(kind)
        status = 0
        if fill != NO_GUESS:
            status = _store_guess(a, kind, at, sample, scratch)
        guess = read_guess(a, fill, sample, scratch, a.low, a.high, stage, spare)
        threshold, ties = -1, 0
        if keep < n:
            threshold, ties = threshold_of(
                kind, fill, guess, at, n, keep, scratch, scratch + BUFFER_AT, a.capacity, spare
            )
        values, scales, index, counts, full = sample_form(a, sample)
        status |= _emit(
            kind,
            fill,
            guess,
            a.value_kind,
            a.index_kind,
            at,
            n,
            keep,
            threshold,
            ties,
            stage,
            spare,
            values,
            scales,
            index,
            counts,
            full,
        )
        if status:
            atomic_or(a.flag, status)
        sample = take_tasks(a, 1)
