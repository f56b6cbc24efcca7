"""Top-K selection, packing and unpacking on the CPU: one thread per sample, vector blocks of 16 elements.

Selecting costs two passes over the sample. A small deterministic sample of magnitudes gives an interval [low, high]
that holds the K-th largest with near certainty; the first pass counts what lies above and collects what lies strictly
inside (a few per cent); the K-th largest follows exactly from those. The second pass emits. When the interval misses
(or ties flood it), an exact radix selection over the whole sample takes its place: the result never depends on the
guess.

Shape legend: n elements per sample, K kept, T = ceil(n / 256) tiles.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..cpu.compiling import EntryPoint
from ..cpu.launch import launch, threads_for
from ..cpu.layout import KIND
from ._cpu_form import form_of
from ._cpu_pack import Pack, pack_worker
from ._cpu_select import BUFFER_AT, MIN_SAMPLED
from ._cpu_unpack import Unpack, unpack_worker
from .layout import Stored

COPIED_BYTES = 0  # of samples that do not lie contiguous, copied at a time: one sample


def entry_points() -> Iterator[EntryPoint]:
    """All that is ever launched from here."""
    for kind in KIND.values():
        yield pack_worker, Pack, (kind,)
        yield unpack_worker, Unpack, (kind,)


def pack(x: Tensor, keep: int, index_kind: str, stored: Stored, flag: Tensor) -> None:
    """Pack the contiguous (B, n) ``x`` into the preallocated contiguous tensors of ``stored``; sets status bits in
    ``flag`` (int32)."""
    batch, n = x.shape
    capacity = n // 8 + 1024
    scratch_bytes = BUFFER_AT + (capacity * 4 if keep < n and n >= MIN_SAMPLED else 0)
    scratch = torch.empty(threads_for(batch) * scratch_bytes, dtype=torch.uint8, device="cpu")
    told = Pack(
        **form_of(stored, n, index_kind) | {"keep": keep},
        source=x.data_ptr(),
        flag=flag.data_ptr(),
        scratch=scratch.data_ptr(),
        scratch_bytes=scratch_bytes,
        capacity=capacity,
    )
    launch(pack_worker, told, batch, (KIND[x.dtype],))


def unpack(stored: Stored, n: int, index_kind: str, out: Tensor) -> None:
    """Fill the contiguous (B, n) ``out`` from the contiguous tensors of ``stored``."""
    batch = out.shape[0]
    scratch = torch.empty(threads_for(batch) * BUFFER_AT, dtype=torch.uint8, device="cpu")
    told = Unpack(
        **form_of(stored, n, index_kind), out=out.data_ptr(), scratch=scratch.data_ptr(), scratch_bytes=BUFFER_AT
    )
    launch(unpack_worker, told, batch, (KIND[out.dtype],))
