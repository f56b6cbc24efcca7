"""A sample's guesses as they were stored, read back."""

from __future__ import annotations

from numba import njit

from ..cpu.layout import F32
from ..cpu.scalars import get_i32, put_i32
from ..topk._cpu_values import decode_values
from ..topk.layout import INT8, TILE
from ._cpu_form import NO_GUESS, SLACK, SampleGuess
from ._cpu_guess import forget_numbers, guess_table


@njit(forceinline=True)
def sample_codes(a, sample):
    """Addresses of a sample's (codes, scales)."""
    return a.codes + sample * a.rows, a.code_scales + sample * ((a.rows + TILE - 1) // TILE) * 2


@njit(forceinline=True)
def unread_guess(a, sample, scratch, low, high):
    """The guesses of a sample whose rows' numbers are not there yet."""
    known = a.known + sample * ((a.n * a.known_bits + 7) // 8)
    return SampleGuess(scratch + a.guess_at, 1, 1.0, low, high, known, a.levels, a.known_bits)


@njit(forceinline=True)
def read_guess(a, fill, sample, scratch, low, high, stage, spare):
    """The guesses of a sample from its stored codes, for elements between ``low`` and ``high``."""
    guess = unread_guess(a, sample, scratch, low, high)
    if fill == NO_GUESS:
        return guess
    means = guess.table
    forget_numbers(spare)
    codes, scales = sample_codes(a, sample)
    for start in range(0, a.rows, TILE):
        count = min(TILE, a.rows - start)
        decode_values(F32, INT8, codes, scales, start, count, stage)
        for i in range(count):
            put_i32(means + (start + i) * 4, get_i32(stage + i * 4))
    table, length, inverse = guess_table(fill, a.features, a.rows, a.n, means, means + (a.rows + SLACK) * 4)
    return SampleGuess(table, length, inverse, low, high, guess.codes, guess.levels, guess.bits)
