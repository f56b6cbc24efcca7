"""Derivatives to codes, and a gradient times what the codes stand for: a thread takes a run of a sample at a time."""

from __future__ import annotations

import numpy
from numba import njit

from ..cpu.counters import count_threads, take_tasks
from ..cpu.lanes import by_kind, cast_load, cast_store, copy_bytes, element_bytes, tail_block
from ..cpu.scalars import get_f32, get_u8, put_f32, put_u8
from ._cpu_lanes import apply_level, encode_even, encode_level
from .cpu import RUN, SPARE_BYTES

_encode_2, _encode_4 = by_kind(encode_level, 2), by_kind(encode_level, 4)
_encode_even = by_kind(encode_even)
_apply_2, _apply_4 = by_kind(apply_level, 2), by_kind(apply_level, 4)


@njit(forceinline=True)
def _encode_bytes(kind, source, thresholds, destination, spare):
    """8-bit codes of 16 elements: 255 thresholds. The first guess is the cell of an even grid over their range."""
    cast_load(kind, source, spare)
    first, last = get_f32(thresholds), get_f32(thresholds + 254 * 4)
    per_unit = numpy.float32(254.0) / (last - first)
    for lane in range(16):
        value = get_f32(spare + lane * 4)
        guess = (value - first) * per_unit
        code = 0
        if guess >= numpy.float32(254.0):
            code = 255
        elif guess > numpy.float32(0.0):
            code = int(guess) + 1
        while code < 255 and value >= get_f32(thresholds + code * 4):
            code += 1
        while code > 0 and not (value >= get_f32(thresholds + (code - 1) * 4)):
            code -= 1
        put_u8(destination + lane, code)


@njit(forceinline=True)
def _encode_block(kind, bits, source, thresholds, per_unit, destination, spare):
    if bits == 2:
        _encode_2(kind, source, thresholds, destination)
    elif bits == 4:
        _encode_4(kind, source, thresholds, destination)
    elif per_unit > 0:
        _encode_even(kind, source, per_unit, destination)
    else:
        _encode_bytes(kind, source, thresholds, destination, spare)


@njit(forceinline=True)
def _apply_block(kind, bits, grad, codes, levels, out, spare):
    if bits == 2:
        _apply_2(kind, grad, codes, levels, out)
    elif bits == 4:
        _apply_4(kind, grad, codes, levels, out)
    else:
        cast_load(kind, grad, spare)
        for lane in range(16):
            put_f32(spare + lane * 4, get_f32(spare + lane * 4) * get_f32(levels + get_u8(codes + lane) * 4))
        cast_store(kind, spare, out)


@njit(forceinline=True)
def encode_worker(a, kind, bits):
    n, thresholds, per_unit = a.n, a.thresholds, a.per_unit
    spare = a.scratch + count_threads(a, 1) * SPARE_BYTES
    runs = (n + RUN - 1) // RUN
    task = take_tasks(a, 1)
    while task < a.batch * runs:
        sample, start = task // runs, (task % runs) * RUN
        at = a.source + sample * n * element_bytes(kind)
        row = a.codes + sample * ((n * bits + 7) // 8)
        for i in range(start, min(start + RUN, n), 16):
            if i + 16 <= n:
                _encode_block(
                    kind, bits, at + i * element_bytes(kind), thresholds, per_unit, row + i * bits // 8, spare
                )
            else:
                tail = tail_block(kind, at, n, i // 16, spare)
                _encode_block(kind, bits, tail, thresholds, per_unit, spare + 64, spare + 128)
                left = (n - i) * bits
                copy_bytes(spare + 64, row + i * bits // 8, (left + 7) // 8)
                if left % 8:  # the padding took part: clear its bits
                    last = row + (n * bits + 7) // 8 - 1
                    put_u8(last, get_u8(last) & ((1 << (left % 8)) - 1))
        task = take_tasks(a, 1)


@njit(forceinline=True)
def apply_worker(a, kind, bits):
    n, grad, levels, out = a.n, a.grad, a.levels, a.out
    spare = a.scratch + count_threads(a, 1) * SPARE_BYTES
    size = element_bytes(kind)
    runs = (n + RUN - 1) // RUN
    task = take_tasks(a, 1)
    while task < a.batch * runs:
        sample, start = task // runs, (task % runs) * RUN
        shift = sample * n * size
        row = a.codes + sample * ((n * bits + 7) // 8)
        for i in range(start, min(start + RUN, n), 16):
            if i + 16 <= n:
                _apply_block(
                    kind, bits, grad + shift + i * size, row + i * bits // 8, levels, out + shift + i * size, spare
                )
            else:
                tail = tail_block(kind, grad + shift, n, i // 16, spare)
                copy_bytes(row + i * bits // 8, spare + 64, ((n - i) * bits + 7) // 8)
                _apply_block(kind, bits, tail, spare + 64, levels, spare + 128, spare)
                copy_bytes(spare + 128, out + shift + i * size, (n - i) * size)
        task = take_tasks(a, 1)
