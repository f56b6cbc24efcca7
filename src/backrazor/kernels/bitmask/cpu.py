"""One-bit masks on the CPU: a compare and a 16-bit store for 16 elements, and back. Work is cut in runs of 64 Ki
elements of a sample."""

from __future__ import annotations

import numpy
import torch
from numba import njit
from torch import Tensor

from ..cpu.lanes import BF16, F16, F32, between, copy_bytes, element_bytes, keep_lanes, tail_block, valid_lanes
from ..cpu.launch import launch, threads_for
from ..cpu.scalars import bits_float, fetch_add, get_i64, get_u8, get_u16, put_u8, put_u16
from .layout import mask_bytes

RUN = 1 << 16  # elements a thread takes at a time: a multiple of 16
SPARE_BYTES = 128  # scratch of a thread: two blocks of 16 float32


@njit(forceinline=True)
def _encode_worker(kind, block):
    """Argument block: counter, slot, batch, n, x, bits, low and high as float32 bits, scratch."""
    batch, n = get_i64(block + 16), get_i64(block + 24)
    source, bits = get_i64(block + 32), get_i64(block + 40)
    low, high = bits_float(get_i64(block + 48)), bits_float(get_i64(block + 56))
    spare = get_i64(block + 64) + fetch_add(block + 8, 1) * SPARE_BYTES
    runs = (n + RUN - 1) // RUN
    task = fetch_add(block, 1)
    while task < batch * runs:
        sample, start = task // runs, (task % runs) * RUN
        stop = min(start + RUN, n)
        at = source + sample * n * element_bytes(kind)
        row = bits + sample * ((n + 7) // 8)
        for i in range(start, stop, 16):
            mask = between(kind, tail_block(kind, at, n, i // 16, spare), low, high) & valid_lanes(n, i // 16)
            if i + 8 < n:
                put_u16(row + i // 8, mask)
            else:
                put_u8(row + i // 8, mask)
        task = fetch_add(block, 1)


@njit(forceinline=True)
def _apply_worker(kind, block):
    """Argument block: counter, slot, batch, n, grad, bits, out, scratch."""
    batch, n = get_i64(block + 16), get_i64(block + 24)
    grad, bits, out = get_i64(block + 32), get_i64(block + 40), get_i64(block + 48)
    spare = get_i64(block + 56) + fetch_add(block + 8, 1) * SPARE_BYTES
    size = element_bytes(kind)
    runs = (n + RUN - 1) // RUN
    task = fetch_add(block, 1)
    while task < batch * runs:
        sample, start = task // runs, (task % runs) * RUN
        stop = min(start + RUN, n)
        shift = sample * n * size
        row = bits + sample * ((n + 7) // 8)
        for i in range(start, stop, 16):
            to = out + shift + i * size
            mask = get_u16(row + i // 8) if i + 8 < n else get_u8(row + i // 8)
            if i + 16 <= n:
                keep_lanes(kind, grad + shift + i * size, mask, to)
            else:
                keep_lanes(kind, tail_block(kind, grad + shift, n, i // 16, spare), mask, spare + 64)
                copy_bytes(spare + 64, to, (n - i) * size)
        task = fetch_add(block, 1)


def _encode_f32(block):
    _encode_worker(F32, block)


def _encode_f16(block):
    _encode_worker(F16, block)


def _encode_bf16(block):
    _encode_worker(BF16, block)


def _apply_32(block):
    _apply_worker(F32, block)


def _apply_16(block):
    _apply_worker(F16, block)


_ENCODE = {torch.float32: _encode_f32, torch.float16: _encode_f16, torch.bfloat16: _encode_bf16}


def _float_bits(value: float) -> int:
    return int(numpy.float32(value).view(numpy.uint32))


def encode(x: Tensor, low: float, high: float) -> Tensor:
    """As ``reference.encode``; x contiguous (B, n)."""
    batch, n = x.shape
    bits = torch.empty(batch, mask_bytes(n), dtype=torch.uint8)
    tasks = batch * -(-n // RUN)
    scratch = torch.empty(threads_for(tasks) * SPARE_BYTES, dtype=torch.uint8)
    bounds = _float_bits(low), _float_bits(high)
    launch(_ENCODE[x.dtype], [0, batch, n, x.data_ptr(), bits.data_ptr(), *bounds, scratch.data_ptr()], tasks)
    return bits


def apply(grad: Tensor, bits: Tensor) -> Tensor:
    """As ``reference.apply``; grad and bits contiguous."""
    batch, n = grad.shape
    out = torch.empty_like(grad)
    tasks = batch * -(-n // RUN)
    scratch = torch.empty(threads_for(tasks) * SPARE_BYTES, dtype=torch.uint8)
    arguments = [0, batch, n, grad.data_ptr(), bits.data_ptr(), out.data_ptr(), scratch.data_ptr()]
    launch(_apply_32 if grad.dtype == torch.float32 else _apply_16, arguments, tasks)
    return out
