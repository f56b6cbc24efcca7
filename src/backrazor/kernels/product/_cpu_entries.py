"""The packed elements of a sample as entries, (offset of a vector, value), in the order of the weight they belong to.

Shape legend: n elements a sample, K kept, C channels, H/W height/width, T tokens, I inputs.
"""

from __future__ import annotations

from numba import njit

from ..cpu.lanes import F32
from ..cpu.scalars import fetch_add, get_i32, get_i64, get_u8, get_u16, popcount, put_i32
from ..cpu.vectors import LANES
from ..topk._cpu_select import INT8
from ..topk._cpu_unpack import decode_values
from ..topk.layout import BITMAP, TILE
from ._cpu_lanes import compress_positions, widen_offsets

# How positions are grouped: by channel, which is the order they have; by channel and the remainders of height and width
# by the strides; by input of a Linear.
CHANNELS, STRIDED, INPUTS = 0, 1, 2


@njit(forceinline=True)
def _positions(index_kind, index, counts, full, n, to):
    """The kept positions, ascending, as int32; up to a vector of slack is written behind them."""
    found = 0
    if index_kind == BITMAP:
        for block in range((n + LANES - 1) // LANES):
            last = block * LANES + 8 >= n  # its second byte is none of ours
            mask = get_u8(index + block * 2) if last else get_u16(index + block * 2)
            compress_positions(block * LANES, mask, to + found * 4)
            found += popcount(mask)
        return
    for tile in range((n + TILE - 1) // TILE):
        count = get_u8(counts + tile) + (((get_u8(full + tile // 8) >> (tile & 7)) & 1) << 8)
        whole = count // LANES * LANES
        for i in range(0, whole, LANES):
            widen_offsets(index + found + i, tile * TILE, to + (found + i) * 4)
        for i in range(whole, count):
            put_i32(to + (found + i) * 4, tile * TILE + get_u8(index + found + i))
        found += count


@njit(forceinline=True)
def _in_order(positions, values, keep, channels, height, width, pitch, unit, entries, starts):
    """Channel by channel, as they come: position (h, w) looks at row h * pitch + w of the matrix."""
    put_i32(starts + 4, 0)
    channel, first, row, behind = 0, 0, 0, width  # the channel's first position; the row and where it ends
    spare = pitch - width
    for i in range(keep):
        position = get_i32(positions + i * 4)
        while position >= first + height * width:
            channel += 1
            first += height * width
            row, behind = 0, first + width
            put_i32(starts + (channel + 1) * 4, i)
        if spare:
            while position >= behind:
                row += 1
                behind += width
        put_i32(entries + i * 8, (position - first + row * spare) * unit)
        put_i32(entries + i * 8 + 4, get_i32(values + i * 4))
    for empty in range(channel + 1, channels + 1):
        put_i32(starts + (empty + 1) * 4, keep)


@njit(forceinline=True)
def _sorted(strided, positions, values, keep, buckets, height, width, strides, pitch, unit, entries, starts, offsets):
    """By counting how many belong to each bucket first. Leaves at word b + 1 of ``starts`` where bucket b begins."""
    down, across = strides
    for bucket in range(buckets + 2):
        put_i32(starts + bucket * 4, 0)
    row, channel, h = 0, 0, 0
    of_row, at_row = 0, 0  # its first bucket and where it looks
    for i in range(keep):
        position = get_i32(positions + i * 4)
        if position >= (row + 1) * width:
            while position >= (row + 1) * width:
                row += 1
                h += 1
                if strided and h == height:
                    h = 0
                    channel += 1
            of_row = (channel * down + h % down) * across if strided else 0
            at_row = h // down * pitch if strided else row
        w = position - row * width
        if not strided:
            bucket, offset = w, at_row * unit
        elif across == 2:
            bucket, offset = of_row + (w & 1), (at_row + (w >> 1)) * unit
        else:
            bucket, offset = of_row + w % across, (at_row + w // across) * unit
        put_i32(positions + i * 4, bucket)
        put_i32(offsets + i * 4, offset)
        slot = starts + (bucket + 1) * 4
        put_i32(slot, get_i32(slot) + 1)
    for bucket in range(1, buckets + 1):
        put_i32(starts + (bucket + 1) * 4, get_i32(starts + (bucket + 1) * 4) + get_i32(starts + bucket * 4))
    for back in range(keep):
        i = keep - 1 - back
        slot = starts + (get_i32(positions + i * 4) + 1) * 4
        entry = get_i32(slot) - 1
        put_i32(slot, entry)
        put_i32(entries + entry * 8, get_i32(offsets + i * 4))
        put_i32(entries + entry * 8 + 4, get_i32(values + i * 4))
    put_i32(starts + (buckets + 1) * 4, keep)


def make_entries(block):
    """One thread's samples. The argument block is laid out by ``cpu._entries``."""
    batch, n, keep = get_i64(block + 16), get_i64(block + 24), get_i64(block + 32)
    value_kind, index_kind = get_i64(block + 40), get_i64(block + 48)
    values, scales, index = get_i64(block + 56), get_i64(block + 64), get_i64(block + 72)
    counts, full, index_pitch = get_i64(block + 80), get_i64(block + 88), get_i64(block + 96)
    entries, entry_pitch, starts, start_pitch = (
        get_i64(block + 104),
        get_i64(block + 112),
        get_i64(block + 120),
        get_i64(block + 128),
    )
    order, buckets, height, width = (
        get_i64(block + 136),
        get_i64(block + 144),
        get_i64(block + 152),
        get_i64(block + 160),
    )
    strides, pitch, unit = (get_i64(block + 168), get_i64(block + 176)), get_i64(block + 184), get_i64(block + 192)
    positions = get_i64(block + 200) + fetch_add(block + 8, 1) * get_i64(block + 208)
    decoded = positions + (keep + LANES) * 4
    offsets = decoded + (keep + TILE + 64) * 4
    tiles = (n + TILE - 1) // TILE
    value_bytes = 1 if value_kind == INT8 else 4 if value_kind == F32 else 2
    sample = fetch_add(block, 1)
    while sample < batch:
        _positions(
            index_kind,
            index + sample * index_pitch,
            counts + sample * tiles,
            full + sample * ((tiles + 7) // 8),
            n,
            positions,
        )
        for start in range(0, keep, TILE):
            decode_values(
                F32,
                value_kind,
                values + sample * keep * value_bytes,
                scales + sample * ((keep + TILE - 1) // TILE) * 2,
                start,
                min(TILE, keep - start),
                decoded + start * 4,
            )
        to, begin = entries + sample * entry_pitch, starts + sample * start_pitch
        if order == CHANNELS:
            _in_order(positions, decoded, keep, buckets, height, width, pitch, unit, to, begin)
        else:
            _sorted(
                order == STRIDED,
                positions,
                decoded,
                keep,
                buckets,
                height,
                width,
                strides,
                pitch,
                unit,
                to,
                begin,
                offsets,
            )
        sample = fetch_add(block, 1)
