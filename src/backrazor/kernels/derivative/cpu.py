"""Quantised derivatives on the CPU: 2 and 4 bits by vector comparisons (4 by bisection on AVX-512); 8 bits by one
multiplication where the thresholds are an even grid about zero in steps of a power of two (those of
``codecs.smooth`` are), else by a guess on an even grid that the thresholds correct."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy
import torch
from torch import Tensor

from ..cpu.arguments import arguments
from ..cpu.entries import EntryPoint, Worker
from ..cpu.launch import launch, threads_for
from ..cpu.layout import KIND
from .layout import code_bytes

_CELLS = numpy.arange(-127, 128)
RUN = 1 << 15  # elements a thread takes at a time: a multiple of 16
SPARE_BYTES = 192  # scratch of a thread: three blocks of 16 float32
ENCODE = Worker(f"{__package__}._cpu_levels", "encode_worker")
APPLY = Worker(f"{__package__}._cpu_levels", "apply_worker")


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


def entry_points() -> Iterator[EntryPoint]:
    """All that is ever launched from here."""
    for kind in KIND.values():
        for bits in (2, 4, 8):
            yield ENCODE, Encode, (kind, bits)
            yield APPLY, Apply, (kind, bits)


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
    launch(ENCODE, told, tasks, (KIND[x.dtype], bits))
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
    launch(APPLY, told, tasks, (KIND[grad.dtype], bits))
    return out
