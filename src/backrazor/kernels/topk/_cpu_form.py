"""The packed form as kernels are told of it.

Shape legend: n elements per sample, K kept, T = ceil(n / 256) tiles.
"""

from __future__ import annotations

from numba import njit

from ..cpu.lanes import element_bytes
from .layout import INDEX, INT4, INT8, TILE, VALUE_KIND, Stored, kept_of


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


@njit(forceinline=True)
def sample_form(a, sample):
    """Addresses of a sample's (values, scales, index, counts, full)."""
    tiles = (a.n + TILE - 1) // TILE
    if a.value_kind == INT4:
        sample_bytes = (a.keep + 1) // 2
    else:
        sample_bytes = a.keep * (1 if a.value_kind == INT8 else element_bytes(a.value_kind))
    return (
        a.values + sample * sample_bytes,
        a.scales + sample * ((a.keep + TILE - 1) // TILE) * 2,
        a.index + sample * a.index_pitch,
        a.counts + sample * tiles,
        a.full + sample * ((tiles + 7) // 8),
    )
