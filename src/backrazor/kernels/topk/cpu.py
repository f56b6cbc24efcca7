"""Top-K selection, packing and unpacking on the CPU: one thread a sample, vector blocks of 16 elements.

Selecting costs two passes over the sample. A small deterministic sample of magnitudes gives an interval [low, high]
that holds the K-th largest with near certainty; the first pass counts what lies above and collects what lies strictly
inside (a few per cent); the K-th largest follows exactly from those. The second pass emits. When the interval misses
(or ties flood it), an exact radix selection over the whole sample takes its place: the result never depends on the
guess.

Shape legend: n elements a sample, K kept, T = ceil(n / 256) tiles.
"""

from __future__ import annotations

import numpy
import torch
from numba import njit
from torch import Tensor

from .._launch import launch, threads_for
from .._llvm import (
    BF16,
    F16,
    F32,
    atomic_or,
    bits_float,
    cast_load,
    cast_store,
    compress_offset,
    copy_bytes,
    element_bytes,
    fetch_add,
    float_bits,
    gather_magnitudes,
    gather_values,
    get_f32,
    get_i32,
    get_i64,
    get_u8,
    get_u16,
    magnitude_masks,
    popcount,
    put_f32,
    put_i32,
    put_i64,
    put_u8,
    put_u16,
    round_even,
    tail_block,
    trailing_zeros,
    valid_lanes,
)
from .layout import TILE, Stored

MIN_SAMPLED = 4096  # below this the selection scans the sample itself
BIN_BITS = 11
BINS = 1 << BIN_BITS
# Scratch of one thread, in bytes: a histogram; one tile of staged float32 with the slack of a vector store and two
# vectors aside; a tail block; for packing, a buffer of collected magnitudes follows.
STAGE_AT = BINS * 4
SPARE_AT = STAGE_AT + (TILE + 64) * 4
BUFFER_AT = SPARE_AT + 64
NON_FINITE, OVERFLOW = 1, 2
NO_INDEX, BITMAP, TILES = 0, 1, 2
INT8 = 3


@njit(forceinline=True)
def _magnitude(kind, source, i):
    if kind == F32:
        return get_i32(source + i * 4) & 0x7FFFFFFF
    return get_u16(source + i * 2) & 0x7FFF


@njit(forceinline=True)
def _clear(histogram):
    for i in range(BINS):
        put_i32(histogram + i * 4, 0)


@njit(forceinline=True)
def _count(histogram, digit):
    slot = histogram + digit * 4
    put_i32(slot, get_i32(slot) + 1)


@njit(cache=True, error_model="numpy")
def _kth_largest_int(values, count, rank, low, high, histogram):
    """(value, ties) of the rank-th largest of ``count`` int32 in [low, high] at ``values``; reorders the buffer.

    Radix selection from the highest bit that the interval leaves open, keeping only the matching entries after each
    digit. What is left of ``rank`` at the end is how many of the entries equal to the value belong to the ``rank``
    largest.
    """
    bits = 1
    while (high - low) >> bits:
        bits += 1
    shift = max(bits - BIN_BITS, 0)
    while True:
        _clear(histogram)
        for i in range(count):
            _count(histogram, ((get_i32(values + i * 4) - low) >> shift) & (BINS - 1))
        digit = BINS - 1
        while get_i32(histogram + digit * 4) < rank:
            rank -= get_i32(histogram + digit * 4)
            digit -= 1
        matching = 0
        for i in range(count):
            value = get_i32(values + i * 4)
            put_i32(values + matching * 4, value)  # final only if it matches: otherwise the next one lands on it
            if ((value - low) >> shift) & (BINS - 1) == digit:
                matching += 1
        count = matching
        if count == 1 or shift == 0:
            return get_i32(values), rank
        shift = max(shift - BIN_BITS, 0)


@njit(forceinline=True)
def _kth_largest_scan(kind, source, n, rank, histogram):
    """(value, ties) of the rank-th largest magnitude by radix selection over the whole sample: three passes, no
    buffer."""
    prefix = 0
    shift = 31
    while shift > 0:
        step = min(BIN_BITS, shift)
        _clear(histogram)
        for i in range(n):
            magnitude = _magnitude(kind, source, i)
            if (magnitude >> shift) == (prefix >> shift):
                _count(histogram, (magnitude >> (shift - step)) & ((1 << step) - 1))
        shift -= step
        digit = (1 << step) - 1
        while get_i32(histogram + digit * 4) < rank:
            rank -= get_i32(histogram + digit * 4)
            digit -= 1
        prefix |= digit << shift
    return prefix, rank


@njit(forceinline=True)
def _bin_at_rank(histogram, rank, shift):
    """The magnitude at which about ``rank`` sampled elements are larger, interpolated inside its bin."""
    digit = BINS - 1
    while digit > 0 and get_i32(histogram + digit * 4) < rank:
        rank -= get_i32(histogram + digit * 4)
        digit -= 1
    if digit == 0:
        return 0
    inside = get_i32(histogram + digit * 4)
    return (digit << shift) + ((inside - rank) << shift) // max(inside, 1)


@njit(forceinline=True)
def _guess(kind, source, n, keep, histogram):
    """(low, high): an interval of magnitudes that almost surely holds the keep-th largest, from a fixed pseudo-random
    sample."""
    size = min(max(n >> 6, 1024), 4096)
    shift = (31 if kind == F32 else 15) - BIN_BITS
    _clear(histogram)
    state = 12345
    for _ in range(size):
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF  # stays below 2^62: signed overflow would be undefined
        _count(histogram, _magnitude(kind, source, (state * n) >> 31) >> shift)
    share = keep / n
    centre = share * size
    # the rank of the true threshold in the sample is binomial: three and a half standard deviations, and a little for
    # tiny shares
    spread = 3.5 * (centre * (1.0 - share)) ** 0.5 + 3.0
    high = 0x7FFFFFFF if centre - spread < 1.0 else _bin_at_rank(histogram, int(centre - spread), shift) + 1
    low = 0 if centre + spread >= size else _bin_at_rank(histogram, int(centre + spread) + 1, shift)
    return low, high


@njit(forceinline=True)
def _threshold(kind, source, n, keep, histogram, buffer, capacity, spare):
    """(threshold, ties): the keep-th largest magnitude, and how many elements equal to it are kept (the first by
    index)."""
    if n < MIN_SAMPLED:
        return _kth_largest_scan(kind, source, n, keep, histogram)
    low, high = _guess(kind, source, n, keep, histogram)
    above = equal_high = equal_low = inside = 0
    for block in range((n + 15) // 16):
        address = tail_block(kind, source, n, block, spare)
        valid = valid_lanes(n, block)
        above_high, at_high = magnitude_masks(kind, address, high)
        above_low, at_low = magnitude_masks(kind, address, low)
        above += popcount(above_high & valid)
        equal_high += popcount(at_high & valid)
        equal_low += popcount(at_low & valid)
        chosen = above_low & ~above_high & ~at_high & valid
        if inside + 16 > capacity:
            return _kth_largest_scan(kind, source, n, keep, histogram)
        gather_magnitudes(kind, address, chosen, buffer + inside * 4)
        inside += popcount(chosen)
    rank = keep - above
    if 0 < rank <= equal_high:
        return high, rank
    rank -= equal_high
    if 0 < rank <= inside:
        return _kth_largest_int(buffer, inside, rank, low, high, histogram)
    rank -= inside
    if low < high and 0 < rank <= equal_low:
        return low, rank
    return _kth_largest_scan(kind, source, n, keep, histogram)


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
    if value_kind == INT8:
        put_f32(spare, bits_float(largest) / numpy.float32(127.0))
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
            quantised = min(max(quantised, numpy.float32(-127.0)), numpy.float32(127.0))
            put_u8(values + position + i, int(quantised))
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
def _pack_worker(kind, block):
    """Take samples from the shared counter until none is left. The argument block is laid out by ``pack``."""
    batch, n, keep = get_i64(block + 16), get_i64(block + 24), get_i64(block + 32)
    value_kind, index_kind = get_i64(block + 40), get_i64(block + 48)
    source, values, scales = get_i64(block + 56), get_i64(block + 64), get_i64(block + 72)
    index, counts, full, flag = get_i64(block + 80), get_i64(block + 88), get_i64(block + 96), get_i64(block + 104)
    index_stride, capacity = get_i64(block + 128), get_i64(block + 136)
    scratch = get_i64(block + 112) + fetch_add(block + 8, 1) * get_i64(block + 120)
    tiles = (n + TILE - 1) // TILE
    value_bytes = 1 if value_kind == INT8 else element_bytes(value_kind)
    sample = fetch_add(block, 1)
    while sample < batch:
        at = source + sample * n * element_bytes(kind)
        threshold, ties = -1, 0
        if keep < n:
            threshold, ties = _threshold(kind, at, n, keep, scratch, scratch + BUFFER_AT, capacity, scratch + SPARE_AT)
        status = _emit(
            kind,
            value_kind,
            index_kind,
            at,
            n,
            keep,
            threshold,
            ties,
            scratch + STAGE_AT,
            scratch + SPARE_AT,
            values + sample * keep * value_bytes,
            scales + sample * ((keep + TILE - 1) // TILE) * 2,
            index + sample * index_stride,
            counts + sample * tiles,
            full + sample * ((tiles + 7) // 8),
        )
        if status:
            atomic_or(flag, status)
        sample = fetch_add(block, 1)


def _pack_f32(block):
    _pack_worker(F32, block)


def _pack_f16(block):
    _pack_worker(F16, block)


def _pack_bf16(block):
    _pack_worker(BF16, block)


@njit(forceinline=True)
def _decode(kind, value_kind, values, scales, position, count, stage):
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
            _decode(kind, value_kind, values, scales, position, count, stage)
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
                    _decode(kind, value_kind, values, scales, position, min(TILE, keep - position), stage)
                _move(kind, stage, position & (TILE - 1), out, byte * 8 + trailing_zeros(mask))
                position += 1
                mask &= mask - 1
        return
    for tile in range((n + TILE - 1) // TILE):
        count = get_u8(counts + tile) + (((get_u8(full + tile // 8) >> (tile & 7)) & 1) << 8)
        _zero(kind, out, tile * TILE, n)
        for _ in range(count):
            if position & (TILE - 1) == 0:
                _decode(kind, value_kind, values, scales, position, min(TILE, keep - position), stage)
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


def _unpack_f32(block):
    _unpack_worker(F32, block)


def _unpack_f16(block):
    _unpack_worker(F16, block)


def _unpack_bf16(block):
    _unpack_worker(BF16, block)


_KIND = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16, torch.int8: INT8}
_INDEX = {"none": NO_INDEX, "bitmap": BITMAP, "tile": TILES}
_PACK = {F32: _pack_f32, F16: _pack_f16, BF16: _pack_bf16}
_UNPACK = {F32: _unpack_f32, F16: _unpack_f16, BF16: _unpack_bf16}


def pack(x: Tensor, keep: int, index_kind: str, stored: Stored, flag: Tensor) -> None:
    """Pack the contiguous (B, n) ``x`` into the preallocated contiguous tensors of ``stored``; sets status bits in
    ``flag`` (int32)."""
    batch, n = x.shape
    threads = threads_for(batch)
    capacity = n // 8 + 1024
    scratch_bytes = BUFFER_AT + (capacity * 4 if keep < n and n >= MIN_SAMPLED else 0)
    scratch = torch.empty(threads * scratch_bytes, dtype=torch.uint8)
    arguments = [
        0,  # the next free scratch slot
        batch,
        n,
        keep,
        _KIND[stored.values.dtype],
        _INDEX[index_kind],
        x.data_ptr(),
        *(tensor.data_ptr() for tensor in stored),
        flag.data_ptr(),
        scratch.data_ptr(),
        scratch_bytes,
        stored.index.stride(0) if stored.index.numel() else 0,
        capacity,
    ]
    launch(_PACK[_KIND[x.dtype]], arguments, batch)


def unpack(stored: Stored, n: int, index_kind: str, out: Tensor) -> None:
    """Fill the contiguous (B, n) ``out`` from the contiguous tensors of ``stored``."""
    batch = out.shape[0]
    threads = threads_for(batch)
    scratch = torch.empty(threads * BUFFER_AT, dtype=torch.uint8)
    arguments = [
        0,
        batch,
        n,
        stored.values.shape[1],
        _KIND[stored.values.dtype],
        _INDEX[index_kind],
        out.data_ptr(),
        *(tensor.data_ptr() for tensor in stored),
        scratch.data_ptr(),
        BUFFER_AT,
        stored.index.stride(0) if stored.index.numel() else 0,
    ]
    launch(_UNPACK[_KIND[out.dtype]], arguments, batch)
