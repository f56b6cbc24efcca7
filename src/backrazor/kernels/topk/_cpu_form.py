"""The packed form as kernels are told of it.

Shape legend: n elements per sample, K kept, T = ceil(n / 256) tiles.
"""

from __future__ import annotations

from ..guess._cpu_form import SPARE_BYTES
from .layout import INDEX, TILE, VALUE_KIND, Stored, kept_of

MIN_SAMPLED = 4096  # below this the selection scans the sample itself
BIN_BITS = 11
BINS = 1 << BIN_BITS
# Scratch of one thread, in bytes: a histogram; one tile of staged float32 with the slack of a vector store and two
# vectors aside; blocks aside; for packing, a buffer of collected magnitudes follows.
STAGE_AT = BINS * 4
SPARE_AT = STAGE_AT + (TILE + 64) * 4
BUFFER_AT = SPARE_AT + SPARE_BYTES


class Form:
    """Fields of an argument block that say where and how a batch is packed."""

    batch: int
    n: int
    keep: int
    value_kind: int
    index_kind: int
    values: int
    scales: int
    index: int
    counts: int
    full: int
    index_pitch: int  # bytes from a sample's index to the next


def form_of(stored: Stored, n: int, index: str) -> dict[str, int]:
    """The values of those fields, for samples of n elements."""
    return {
        "batch": stored.values.shape[0],
        "n": n,
        "keep": kept_of(stored, n, index),
        "value_kind": VALUE_KIND[stored.values.dtype],
        "index_kind": INDEX[index],
        "values": stored.values.data_ptr(),
        "scales": stored.scales.data_ptr(),
        "index": stored.index.data_ptr(),
        "counts": stored.counts.data_ptr(),
        "full": stored.full.data_ptr(),
        "index_pitch": stored.index.stride(0) if stored.index.numel() else 0,
    }
