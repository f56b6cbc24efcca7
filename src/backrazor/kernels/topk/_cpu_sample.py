"""Where a sample of a packed batch lies.

Shape legend: n elements per sample, K kept.
"""

from __future__ import annotations

from numba import njit

from ..cpu.lanes import element_bytes
from .layout import INT4, INT8, TILE


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
