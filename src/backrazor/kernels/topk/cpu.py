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

from ..cpu.arguments import arguments
from ..cpu.entries import EntryPoint, Worker
from ..cpu.launch import launch, threads_for
from ..cpu.layout import KIND
from ..guess._cpu_form import FILLS, Guess, fill_of, guess_numbers, guess_of
from ..guess.layout import Guesses
from ._cpu_form import BUFFER_AT, MIN_SAMPLED, Form, form_of
from .layout import Stored

COPIED_BYTES = 0  # of samples that do not lie contiguous, copied at a time: one sample
PACK = Worker(f"{__package__}._cpu_pack", "pack_worker")
UNPACK = Worker(f"{__package__}._cpu_unpack", "unpack_worker")


@arguments
class Pack(Form, Guess):
    """A batch and where it is packed to."""

    source: int
    flag: int
    scratch: int
    scratch_bytes: int  # of one thread
    capacity: int  # magnitudes that the buffer behind BUFFER_AT holds
    low: float
    high: float


@arguments
class Unpack(Form, Guess):
    """A packed batch and where it is unpacked to."""

    out: int
    bits: int  # where guesses hold, one bit per element; 0: everywhere
    scratch: int
    scratch_bytes: int  # of one thread


def entry_points() -> Iterator[EntryPoint]:
    """All that is ever launched from here."""
    for kind in KIND.values():
        for fill in FILLS:
            yield PACK, Pack, (kind, fill)
            yield UNPACK, Unpack, (kind, fill)


def pack(x: Tensor, keep: int, index_kind: str, stored: Stored, flag: Tensor, guesses: Guesses | None = None) -> None:
    """Pack the contiguous (B, n) ``x`` into the preallocated contiguous tensors of ``stored``; sets status bits in
    ``flag`` (int32). With ``guesses``: their codes are written, and x is packed less what they say."""
    batch, n = x.shape
    capacity = n // 8 + 1024
    guess_at = BUFFER_AT + (capacity * 4 if keep < n and n >= MIN_SAMPLED else 0)
    scratch_bytes = guess_at + guess_numbers(n, guesses) * 4
    scratch = torch.empty(threads_for(batch) * scratch_bytes, dtype=torch.uint8, device="cpu")
    low, high = (0.0, 0.0) if guesses is None else (guesses.low, guesses.high)
    told = Pack(
        **form_of(stored, n, index_kind) | {"keep": keep},
        **guess_of(guesses, guess_at),
        source=x.data_ptr(),
        flag=flag.data_ptr(),
        scratch=scratch.data_ptr(),
        scratch_bytes=scratch_bytes,
        capacity=capacity,
        low=low,
        high=high,
    )
    launch(PACK, told, batch, (KIND[x.dtype], fill_of(n, guesses)))


def unpack(
    stored: Stored, n: int, index_kind: str, out: Tensor, guesses: Guesses | None = None, bits: Tensor | None = None
) -> None:
    """Fill the contiguous (B, n) ``out`` from the contiguous tensors of ``stored``, and with ``guesses`` from these,
    everywhere or where ``bits`` (B, ceil(n / 8)) are set."""
    batch = out.shape[0]
    scratch_bytes = BUFFER_AT + guess_numbers(n, guesses) * 4
    scratch = torch.empty(threads_for(batch) * scratch_bytes, dtype=torch.uint8, device="cpu")
    told = Unpack(
        **form_of(stored, n, index_kind),
        **guess_of(guesses, BUFFER_AT),
        out=out.data_ptr(),
        bits=0 if bits is None else bits.data_ptr(),
        scratch=scratch.data_ptr(),
        scratch_bytes=scratch_bytes,
    )
    launch(UNPACK, told, batch, (KIND[out.dtype], fill_of(n, guesses)))
