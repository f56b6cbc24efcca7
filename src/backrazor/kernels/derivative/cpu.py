"""Quantised derivatives on the CPU: 2 and 4 bits by vector comparisons (4 by bisection on AVX-512); 8 bits by one
multiplication where the thresholds are an even grid about zero in steps of a power of two (those of
``codecs.smooth`` are), else by a guess on an even grid that the thresholds correct."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy
import torch
from numba import njit
from torch import Tensor

from ..cpu.arguments import arguments, count_threads, take_tasks
from ..cpu.compiling import EntryPoint
from ..cpu.lanes import by_kind, cast_load, cast_store, copy_bytes, element_bytes, tail_block
from ..cpu.launch import launch, threads_for
from ..cpu.layout import KIND
from ..cpu.scalars import get_f32, get_u8, put_f32, put_u8
from ._cpu_lanes import apply_level, encode_even, encode_level
from .layout import code_bytes

_CELLS = numpy.arange(-127, 128)
RUN = 1 << 15  # elements a thread takes at a time: a multiple of 16
SPARE_BYTES = 192  # scratch of a thread: three blocks of 16 float32

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


@arguments
class Encode:
    """A batch, its thresholds and where its codes go."""

    batch: int
    n: int
    source: int
    thresholds: int
    per_unit: float  # cells per unit of an even grid, or 0
    codes: int
    scratch: int


@arguments
class Apply:
    """A gradient, its codes, their levels and where the product goes."""

    batch: int
    n: int
    grad: int
    codes: int
    levels: int
    out: int
    scratch: int


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


def entry_points() -> Iterator[EntryPoint]:
    """All that is ever launched from here."""
    for kind in KIND.values():
        for bits in (2, 4, 8):
            yield encode_worker, Encode, (kind, bits)
            yield apply_worker, Apply, (kind, bits)


@lru_cache(maxsize=16)
def _cells_per_unit(thresholds: bytes) -> int:
    """1 / step of 255 float32 thresholds (i - 127) * step where that is a power of two, else 0."""
    values = numpy.frombuffer(thresholds, dtype=numpy.float32)
    per_unit = 1 / float(values[128]) if values[128] > 0 else 0.0
    whole = per_unit.is_integer() and int(per_unit).bit_count() == 1 and per_unit < 1 << 16
    return int(per_unit) if whole and bool((values * per_unit == _CELLS).all()) else 0


def encode(x: Tensor, thresholds: Tensor, bits: int) -> Tensor:
    """As ``reference.encode``; x contiguous."""
    batch, n = x.shape
    codes = torch.empty(batch, code_bytes(n, bits), dtype=torch.uint8, device="cpu")
    tasks = batch * -(-n // RUN)
    scratch = torch.empty(threads_for(tasks) * SPARE_BYTES, dtype=torch.uint8, device="cpu")
    told = Encode(
        batch=batch,
        n=n,
        source=x.data_ptr(),
        thresholds=thresholds.data_ptr(),
        per_unit=_cells_per_unit(thresholds.numpy().tobytes()) if bits == 8 else 0,
        codes=codes.data_ptr(),
        scratch=scratch.data_ptr(),
    )
    launch(encode_worker, told, tasks, (KIND[x.dtype], bits))
    return codes


def apply(grad: Tensor, codes: Tensor, levels: Tensor, bits: int) -> Tensor:
    """As ``reference.apply``; grad and codes contiguous."""
    batch, n = grad.shape
    out = torch.empty_like(grad)
    tasks = batch * -(-n // RUN)
    scratch = torch.empty(threads_for(tasks) * SPARE_BYTES, dtype=torch.uint8, device="cpu")
    told = Apply(
        batch=batch,
        n=n,
        grad=grad.data_ptr(),
        codes=codes.data_ptr(),
        levels=levels.data_ptr(),
        out=out.data_ptr(),
        scratch=scratch.data_ptr(),
    )
    launch(apply_worker, told, tasks, (KIND[grad.dtype], bits))
    return out
