"""What packing stores: five tensors whose shapes follow from (B, n, K) alone, so bytes are known before the step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..cpu.layout import KIND

TILE = 256  # elements that share a count of kept ones; kept values that share a scale
NON_FINITE, OVERFLOW = 1, 2  # status bits
INT8_LIMIT, INT4_LIMIT = 127, 7  # the largest code of int8 and of int4 values
# How kernels name the type of stored values and the form of the index: not 0 or 1, see ``cpu.layout``.
INT8, INT4 = 111, 112
VALUE_KIND = KIND | {torch.int8: INT8, torch.uint8: INT4}
# Values that share scales, and the types that hold them.
INTEGERS, INTEGER_TYPES = ("int8", "int4"), (torch.int8, torch.uint8)
NO_INDEX, BITMAP, TILES = 121, 122, 123
INDEX = {"none": NO_INDEX, "bitmap": BITMAP, "tile": TILES}

# On CUDA. Of a sample up to this size one program packs all: its passes take less time than six launches.
SAMPLE_ELEMENTS = 1 << 15
DIGITS = {4: (11, 11, 9), 2: (8, 7)}  # bits of |x| looked at in each pass, by element size
SLOTS = 3  # of a sample's state, one for each digit
LONGEST_CHUNK = 1 << 15
# Counters and kept values on their way to integers take about this at most, or one sample's worth; samples that do not
# lie contiguous are copied that much at a time.
SCRATCH_BYTES = 32 << 20
COPIED_BYTES = 32 << 20


class Stored(NamedTuple):
    """The packed form of a (B, n) tensor; unused parts are empty.

    values (B, K): float32, float16, bfloat16 or int8; of int4 (B, ceil(K / 2)) uint8, two codes per byte, the first in
    the low half. scales (B, ceil(K / 256)) bfloat16: int8 and int4 only. index uint8: "bitmap" (B, ceil(n / 8)) or
    "tile" (B, K). counts (B, T) and full (B, ceil(T / 8)) uint8: "tile" only, T = ceil(n / 256).
    """

    values: Tensor
    scales: Tensor
    index: Tensor
    counts: Tensor
    full: Tensor


def index_bytes(n: int, keep: int, index: str) -> int:
    """Bytes a sample of n elements spends on the index of its K kept ones."""
    if index == "none":
        return 0
    if index == "bitmap":
        return -(-n // 8)
    tiles = -(-n // TILE)
    return keep + tiles + -(-tiles // 8)


def stored_dtype(values: str) -> torch.dtype:
    """The type of the tensor that holds ``values``; int4 lies in bytes."""
    return torch.uint8 if values == "int4" else getattr(torch, values)


def kept_of(stored: Stored, n: int, index: str) -> int:
    """K, how many of n elements are stored; of int4 with a bitmap, K or K + 1: what lies behind the last is zero."""
    if index == "none":
        return n
    if index == "tile":
        return stored.index.shape[1]
    return stored.values.shape[1] * (2 if stored.values.dtype == torch.uint8 else 1)


def allocate(batch: int, n: int, keep: int, values: torch.dtype, index: str, device: torch.device) -> Stored:
    """Uninitialised tensors of the right shapes."""

    def new(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    tiles = -(-n // TILE)
    return Stored(
        values=new(batch, -(-keep // 2) if values == torch.uint8 else keep, dtype=values),
        scales=new(batch, -(-keep // TILE), dtype=torch.bfloat16)
        if values in INTEGER_TYPES
        else new(0, dtype=torch.bfloat16),
        index={"none": lambda: new(0), "bitmap": lambda: new(batch, -(-n // 8)), "tile": lambda: new(batch, keep)}[
            index
        ](),
        counts=new(batch, tiles) if index == "tile" else new(0),
        full=new(batch, -(-tiles // 8)) if index == "tile" else new(0),
    )


def counter_bytes(n: int, element_bytes: int) -> int:
    """Bytes of counters that the selection of one sample takes on CUDA; what a small batch adds to fill the device with
    chunks is a few MiB."""
    bins = [1 << bits for bits in DIGITS[element_bytes]]
    return 4 * (sum(bins) + 2 * SLOTS + -(-n // LONGEST_CHUNK) * (bins[-1] + 2))


def cuda_scratch(x: Tensor, keep: int, values: str, index: str) -> int:
    """Bytes that packing x (B, ...) takes on CUDA in passing, beside what it returns."""
    batch, n = x.shape[0], x[:1].numel()
    if not x.numel() or x.element_size() not in DIGITS:
        return 0
    copied = 0 if x.is_contiguous() else min(batch * n * x.element_size(), max(COPIED_BYTES, n * x.element_size()))
    if index == "none" and keep == n:
        return copied
    counters = counter_bytes(n, x.element_size()) if n > SAMPLE_ELEMENTS else 0
    sample = counters + (keep * x.element_size() if values in INTEGERS else 0)
    return copied + min(batch * sample, max(SCRATCH_BYTES, sample))
