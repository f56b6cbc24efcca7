"""One-bit masks on the CPU: a compare and a 16-bit store for 16 elements, and back. Work is cut in runs of 64 Ki
elements of a sample."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from numba import njit
from torch import Tensor

from ..cpu.arguments import arguments, count_threads, take_tasks
from ..cpu.compiling import EntryPoint
from ..cpu.lanes import between, copy_bytes, element_bytes, keep_lanes, tail_block, valid_lanes
from ..cpu.launch import launch, threads_for
from ..cpu.layout import F16, F32, KIND
from ..cpu.scalars import get_u8, get_u16, put_u8, put_u16
from .layout import mask_bytes

RUN = 1 << 16  # elements a thread takes at a time: a multiple of 16
SPARE_BYTES = 128  # scratch of a thread: two blocks of 16 float32


@arguments
class Encode:
    """A batch, its bounds and where its bits go."""

    batch: int
    n: int
    source: int
    bits: int
    low: float
    high: float
    scratch: int


@arguments
class Apply:
    """A gradient, its bits and where the rest of it goes."""

    batch: int
    n: int
    grad: int
    bits: int
    out: int
    scratch: int


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


def entry_points() -> Iterator[EntryPoint]:
    """All that is ever launched from here."""
    for kind in KIND.values():
        yield encode_worker, Encode, (kind,)
    for kind in (F32, F16):
        yield apply_worker, Apply, (kind,)


def encode(x: Tensor, low: float, high: float) -> Tensor:
    """As ``reference.encode``; x contiguous (B, n)."""
    batch, n = x.shape
    bits = torch.empty(batch, mask_bytes(n), dtype=torch.uint8, device="cpu")
    tasks = batch * -(-n // RUN)
    scratch = torch.empty(threads_for(tasks) * SPARE_BYTES, dtype=torch.uint8, device="cpu")
    told = Encode(
        batch=batch,
        n=n,
        source=x.data_ptr(),
        bits=bits.data_ptr(),
        low=low,
        high=high,
        scratch=scratch.data_ptr(),
    )
    launch(encode_worker, told, tasks, (KIND[x.dtype],))
    return bits


def apply(grad: Tensor, bits: Tensor) -> Tensor:
    """As ``reference.apply``; grad and bits contiguous."""
    batch, n = grad.shape
    out = torch.empty_like(grad)
    tasks = batch * -(-n // RUN)
    scratch = torch.empty(threads_for(tasks) * SPARE_BYTES, dtype=torch.uint8, device="cpu")
    told = Apply(
        batch=batch,
        n=n,
        grad=grad.data_ptr(),
        bits=bits.data_ptr(),
        out=out.data_ptr(),
        scratch=scratch.data_ptr(),
    )
    # of 16 bits either type: only their size matters
    launch(apply_worker, told, tasks, (F32 if grad.dtype == torch.float32 else F16,))
    return out
