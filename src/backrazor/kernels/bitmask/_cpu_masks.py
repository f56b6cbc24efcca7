"""One bit for each of 16 elements, from a comparison, and a gradient where the bits are set."""

from __future__ import annotations

from numba import njit

from ..cpu.counters import count_threads, take_tasks
from ..cpu.lanes import between, copy_bytes, element_bytes, keep_lanes, tail_block, valid_lanes
from ..cpu.scalars import get_u8, get_u16, put_u8, put_u16
from .cpu import RUN, SPARE_BYTES


@njit(forceinline=True)
def encode_worker(a, kind):
    n, low, high = a.n, a.low, a.high
    spare = a.scratch + count_threads(a, 1) * SPARE_BYTES
    runs = (n + RUN - 1) // RUN
    task = take_tasks(a, 1)
    while task < a.batch * runs:
        sample, start = task // runs, (task % runs) * RUN
        stop = min(start + RUN, n)
        at = a.source + sample * n * element_bytes(kind)
        row = a.bits + sample * ((n + 7) // 8)
        for i in range(start, stop, 16):
            mask = between(kind, tail_block(kind, at, n, i // 16, spare), low, high) & valid_lanes(n, i // 16)
            if i + 8 < n:
                put_u16(row + i // 8, mask)
            else:
                put_u8(row + i // 8, mask)
        task = take_tasks(a, 1)


@njit(forceinline=True)
def apply_worker(a, kind):
    n, grad, out = a.n, a.grad, a.out
    spare = a.scratch + count_threads(a, 1) * SPARE_BYTES
    size = element_bytes(kind)
    runs = (n + RUN - 1) // RUN
    task = take_tasks(a, 1)
    while task < a.batch * runs:
        sample, start = task // runs, (task % runs) * RUN
        stop = min(start + RUN, n)
        shift = sample * n * size
        row = a.bits + sample * ((n + 7) // 8)
        for i in range(start, stop, 16):
            to = out + shift + i * size
            mask = get_u16(row + i // 8) if i + 8 < n else get_u8(row + i // 8)
            if i + 16 <= n:
                keep_lanes(kind, grad + shift + i * size, mask, to)
            else:
                keep_lanes(kind, tail_block(kind, grad + shift, n, i // 16, spare), mask, spare + 64)
                copy_bytes(spare + 64, to, (n - i) * size)
        task = take_tasks(a, 1)
