"""Row-wise quantisation on the CPU: one pass for the row's largest magnitude, one to quantise while the row is in the
cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..cpu.arguments import arguments
from ..cpu.entries import EntryPoint, Worker
from ..cpu.launch import launch, threads_for
from ..cpu.layout import KIND
from ..derivative.layout import code_bytes
from .reference import affine

ROWS = 64  # rows per thread at a time
SPARE_BYTES = 192
ENCODE = Worker(f"{__package__}._cpu_rows", "encode_worker")
DECODE = Worker(f"{__package__}._cpu_rows", "decode_worker")


@arguments
class Encode:
    """Rows, their statistics and where they are stored."""

    rows: int
    m: int
    source: int
    means: int
    rstds: int
    codes: int
    scales: int
    scratch: int


@arguments
class Decode:
    """Stored rows and where they are read back to."""

    rows: int
    m: int
    codes: int
    scales: int
    out: int
    scratch: int


def entry_points() -> Iterator[EntryPoint]:
    """All that is ever launched from here."""
    for kind in KIND.values():
        for bits in (4, 8):
            yield ENCODE, Encode, (kind, bits)
            yield DECODE, Decode, (kind, bits)


def encode(x: Tensor, mean: Tensor, rstd: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """As ``reference.encode``; x contiguous."""
    rows, m = x.shape
    codes = torch.empty(rows, code_bytes(m, bits), dtype=torch.uint8, device="cpu")
    scales = torch.empty(rows, dtype=torch.float16, device="cpu")
    tasks = -(-rows // ROWS)
    scratch = torch.empty(threads_for(tasks) * SPARE_BYTES, dtype=torch.uint8, device="cpu")
    told = Encode(
        rows=rows,
        m=m,
        source=x.data_ptr(),
        means=mean.data_ptr(),
        rstds=rstd.data_ptr(),
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        scratch=scratch.data_ptr(),
    )
    launch(ENCODE, told, tasks, (KIND[x.dtype], bits))
    return codes, scales


def decode(
    codes: Tensor,
    scales: Tensor,
    m: int,
    bits: int,
    dtype: torch.dtype,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """As ``reference.decode``; codes contiguous."""
    rows = codes.shape[0]
    out = torch.empty(rows, m, dtype=dtype, device="cpu")
    tasks = -(-rows // ROWS)
    scratch = torch.empty(threads_for(tasks) * SPARE_BYTES, dtype=torch.uint8, device="cpu")
    told = Decode(
        rows=rows,
        m=m,
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        out=out.data_ptr(),
        scratch=scratch.data_ptr(),
    )
    launch(DECODE, told, tasks, (KIND[dtype], bits))
    return affine(out, weight, bias)
