"""The packed elements of a sample as entries, (offset of a vector, value), in the order of the weight they belong to.

Shape legend: n elements per sample, K kept, C channels, H/W height/width, T tokens, I inputs.
"""

from __future__ import annotations

from numba import njit

from ..cpu.counters import count_threads, take_tasks
from ..cpu.layout import F32, LANES
from ..cpu.scalars import get_i32, get_u8, get_u16, popcount, put_i32
from ..topk._cpu_sample import sample_form
from ..topk._cpu_values import decode_values
from ..topk.layout import BITMAP, TILE
from ._cpu_form import CHANNELS, STRIDED
from ._cpu_lanes import compress_positions, widen_offsets


@njit(forceinline=True)
def _positions(index_kind, index, counts, full, n, to):
    """Writes the kept positions, ascending, as int32, and up to a vector of slack behind them; returns how many."""
    found = 0
    if index_kind == BITMAP:
        for block in range((n + LANES - 1) // LANES):
            last = block * LANES + 8 >= n  # its second byte is none of ours
            mask = get_u8(index + block * 2) if last else get_u16(index + block * 2)
            compress_positions(block * LANES, mask, to + found * 4)
            found += popcount(mask)
        return found
    for tile in range((n + TILE - 1) // TILE):
        count = get_u8(counts + tile) + (((get_u8(full + tile // 8) >> (tile & 7)) & 1) << 8)
        whole = count // LANES * LANES
        for i in range(0, whole, LANES):
            widen_offsets(index + found + i, tile * TILE, to + (found + i) * 4)
        for i in range(whole, count):
            put_i32(to + (found + i) * 4, tile * TILE + get_u8(index + found + i))
        found += count
    return found


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


@njit(forceinline=True)
def entries_worker(a):
    """Take samples until none is left."""
    keep, batch, n, value_kind, index_kind = a.keep, a.batch, a.n, a.value_kind, a.index_kind
    all_entries, entry_pitch, all_starts, start_pitch = a.entries, a.entry_pitch, a.starts, a.start_pitch
    order, buckets, height, width, pitch, unit = a.order, a.buckets, a.height, a.width, a.pitch, a.unit
    strides = a.down, a.across
    positions = a.scratch + count_threads(a, 1) * a.scratch_bytes
    decoded = positions + (keep + LANES) * 4
    offsets = decoded + (keep + TILE + 64) * 4
    sample = take_tasks(a, 1)
    while sample < batch:
        values, scales, index, counts, full = sample_form(a, sample)
        found = _positions(index_kind, index, counts, full, n, positions)  # of int4 ``keep`` may be one more
        for start in range(0, found, TILE):
            count = min(TILE, found - start)
            decode_values(F32, value_kind, values, scales, start, count, decoded + start * 4)
        entries, starts = all_entries + sample * entry_pitch, all_starts + sample * start_pitch
        if order == CHANNELS:
            _in_order(positions, decoded, found, buckets, height, width, pitch, unit, entries, starts)
        else:
            _sorted(
                order == STRIDED,
                positions,
                decoded,
                found,
                buckets,
                height,
                width,
                strides,
                pitch,
                unit,
                entries,
                starts,
                offsets,
            )
        sample = take_tasks(a, 1)
