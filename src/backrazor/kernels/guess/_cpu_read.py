"""A sample's guesses as they were stored, read back."""

from __future__ import annotations

from numba import njit

from ..cpu.layout import F32
from ..cpu.scalars import get_i32, put_i32
from ..topk._cpu_values import decode_values
from ..topk.layout import INT8, TILE
from ._cpu_form import NO_GUESS, SLACK
from ._cpu_guess import forget_numbers, guess_table


@njit(forceinline=True)
def sample_codes(a, sample):
    """Addresses of a sample's (codes, scales)."""
    return a.codes + sample * a.rows, a.code_scales + sample * ((a.rows + TILE - 1) // TILE) * 2


@njit(forceinline=True)
def told_of(a, sample):
    """A sample's known codes, what they stand for, and their bits."""
    return a.known + sample * ((a.n * a.known_bits + 7) // 8), a.levels, a.known_bits


@njit(forceinline=True)
def read_guess(a, fill, sample, scratch, stage, spare):
    """What ``block_numbers`` is told of a sample, from its stored codes."""
    means = scratch + a.guess_at
    if fill == NO_GUESS:
        return means, 1, 1.0
    forget_numbers(spare)
    codes, scales = sample_codes(a, sample)
    for start in range(0, a.rows, TILE):
        count = min(TILE, a.rows - start)
        decode_values(F32, INT8, codes, scales, start, count, stage)
        for i in range(count):
            put_i32(means + (start + i) * 4, get_i32(stage + i * 4))
    return guess_table(fill, a.features, a.rows, a.n, means, means + (a.rows + SLACK) * 4)
