"""Sums of the matrix's rows that a mask selects, times a number per sample and channel.

A mask is half full, so that rows one by one would be as much work as the dense product. Instead the sums of all subsets
of four rows are tabulated, and four bits of the mask name one of them (the method of the four Russians): a quarter of
the additions, and tables that serve all channels and taps.

Shape legend: B samples, C/D input/output channels, groups of 16 output channels.
"""

from __future__ import annotations

from numba import njit

from ..cpu.counters import count_threads, take_tasks
from ..cpu.scalars import get_f32, get_i64, get_u8, put_i64
from ._cpu_form import BLOCK, NIBBLE, SUBSETS, TABLE_VECTORS, TABLES, VECTOR
from ._cpu_lanes import add_subsets, subset_sums

_tabulate_one, _tabulate_most = subset_sums(1), subset_sums(TABLE_VECTORS)
_add_one, _add_most = add_subsets(1), add_subsets(TABLE_VECTORS)
CHUNK = 32  # bits that are moved at a time


@njit(forceinline=True)
def _taken(source, first, count):
    """``count`` bits, at most ``CHUNK``, from bit ``first`` on; no byte without one of them is read."""
    word = 0
    for byte in range(first // 8, (first + count + 7) // 8):
        word |= get_u8(source + byte) << ((byte - first // 8) * 8)
    return (word >> (first & 7)) & ((1 << count) - 1)


@njit(forceinline=True)
def _put(word, to, bit):
    """Sets bits from bit ``bit`` on where there are zeros."""
    place = to + bit // 8
    put_i64(place, get_i64(place) | (word << (bit & 7)))


@njit(forceinline=True)
def _every_second(word):
    """Bits 0, 2, 4, ... of 32 side by side."""
    word &= 0x55555555
    word = (word | (word >> 1)) & 0x33333333
    word = (word | (word >> 2)) & 0x0F0F0F0F
    word = (word | (word >> 4)) & 0x00FF00FF
    return (word | (word >> 8)) & 0x0000FFFF


@njit(forceinline=True)
def spread_worker(a):
    """A piece of work is a channel of a sample."""
    batch, channels, height, width, down, across = a.batch, a.channels, a.height, a.width, a.down, a.across
    pitch, front, source, source_pitch = a.pitch, a.front, a.source, a.source_pitch
    strings, string_bytes = a.strings, a.string_bytes
    classes = down * across
    task = take_tasks(a, 1)
    while task < batch * channels:
        bits = source + task // channels * source_pitch
        to = strings + task * classes * string_bytes
        for word in range(classes * string_bytes // 8):
            put_i64(to + word * 8, 0)
        first = task % channels * height * width
        for h in range(height):
            line, bit = to + h % down * across * string_bytes, front + h // down * pitch
            for w in range(0, width, CHUNK):
                count = min(CHUNK, width - w)
                word = _taken(bits, first + h * width + w, count)
                if across == 1:
                    _put(word, line, bit + w)
                elif across == 2:
                    _put(_every_second(word), line, bit + w // 2)
                    _put(_every_second(word >> 1), line + string_bytes, bit + w // 2)
                else:
                    for i in range(count):
                        _put((word >> i) & 1, line + (w + i) % across * string_bytes, bit + (w + i) // across)
        task = take_tasks(a, 1)


@njit(forceinline=True)
def masked_worker(a):
    """A piece of work is some input channels and some groups of output channels."""
    batch, channels, piece, groups, rows = a.batch, a.channels, a.piece, a.groups, a.rows
    matrix, matrix_pitch, unit, front = a.matrix, a.matrix_pitch, a.unit, a.front
    strings, string_bytes, numbers, sums = a.strings, a.string_bytes, a.numbers, a.sums
    classes, table, taps = a.classes, a.table, a.taps
    tables = a.scratch + count_threads(a, 1) * a.scratch_bytes
    pieces = (channels + piece - 1) // piece
    together = groups // TABLE_VECTORS  # ranges of several groups; those that are left are ranges of one
    ranges = together + groups % TABLE_VECTORS
    task = take_tasks(a, 1)
    while task < pieces * ranges:
        which = task % ranges
        several = which < together
        group = which * TABLE_VECTORS if several else together * (TABLE_VECTORS - 1) + which
        begin, end = task // ranges * piece, min((task // ranges + 1) * piece, channels)
        for sample in range(batch):
            for block in range(0, rows, BLOCK):
                at = matrix + sample * matrix_pitch + block * unit + group * VECTOR
                for i in range(TABLES):
                    if several:
                        _tabulate_most(at + i * NIBBLE * unit, unit, tables + i * SUBSETS * TABLE_VECTORS * VECTOR)
                    else:
                        _tabulate_one(at + i * NIBBLE * unit, unit, tables + i * SUBSETS * VECTOR)
                for channel in range(begin, end):
                    number = get_f32(numbers + (sample * channels + channel) * 4)
                    own = sums + (channel * taps * groups + group) * VECTOR
                    for kind in range(classes):
                        string = strings + ((sample * channels + channel) * classes + kind) * string_bytes
                        for i in range(get_i64(table + kind * 8), get_i64(table + kind * 8 + 8)):
                            tap, shift = get_i64(table + i * 16), get_i64(table + i * 16 + 8)
                            bit = front + block - shift
                            bits = (get_i64(string + bit // 8) >> (bit & 7)) & ((1 << BLOCK) - 1)
                            if bits == 0:
                                continue
                            if several:
                                _add_most(bits, number, tables, own + tap * groups * VECTOR)
                            else:
                                _add_one(bits, number, tables, own + tap * groups * VECTOR)
        task = take_tasks(a, 1)
