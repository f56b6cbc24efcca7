"""One-bit masks on the CPU: a compare and a 16-bit store for 16 elements, and back. Work is cut in runs of 64 Ki
elements of a sample."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..cpu.arguments import arguments
from ..cpu.entries import EntryPoint, Worker
from ..cpu.launch import launch, threads_for
from ..cpu.layout import F16, F32, KIND
from .layout import mask_bytes

RUN = 1 << 16  # elements a thread takes at a time: a multiple of 16
SPARE_BYTES = 128  # scratch of a thread: two blocks of 16 float32
ENCODE = Worker(f"{__package__}._cpu_masks", "encode_worker")
APPLY = Worker(f"{__package__}._cpu_masks", "apply_worker")


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


def entry_points() -> Iterator[EntryPoint]:
    """All that is ever launched from here."""
    for kind in KIND.values():
        yield ENCODE, Encode, (kind,)
    for kind in (F32, F16):
        yield APPLY, Apply, (kind,)


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
    launch(ENCODE, told, tasks, (KIND[x.dtype],))
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
    launch(APPLY, told, tasks, (F32 if grad.dtype == torch.float32 else F16,))
    return out
