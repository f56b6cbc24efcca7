"""The guesses of a batch as kernels are told of them: one int8 per row of a sample, and scales as of any values."""

from __future__ import annotations

from numba import njit

from ..cpu.layout import F32, LANES
from ..cpu.scalars import get_i32, put_i32
from ..topk._cpu_values import decode_values
from ..topk.layout import INT8, TILE
from ._cpu_guess import NO_GUESS, ROWS, SLACK, TABLE, forget_numbers, guess_table
from .layout import Guesses


class Guess:
    """Fields of an argument block that say where the guesses of a batch are."""

    features: int
    rows: int
    codes: int
    code_scales: int
    guess_at: int  # in a thread's scratch: room for ``guess_numbers`` float32


def guess_numbers(n: int, guesses: Guesses | None) -> int:
    """Room in a thread's scratch for a sample's means, and for their counts or their table, in float32."""
    if guesses is None:
        return 0
    rows = guesses.codes.shape[1]
    return rows + SLACK + max(rows, n if n // rows < LANES else 0) + SLACK


def fill_of(n: int, guesses: Guesses | None) -> int:
    """How an element's guess is found."""
    if guesses is None:
        return NO_GUESS
    return TABLE if guesses.features or n // guesses.codes.shape[1] < LANES else ROWS


def guess_of(guesses: Guesses | None, guess_at: int) -> dict[str, int]:
    """The values of those fields."""
    if guesses is None:
        return {"features": 0, "rows": 0, "codes": 0, "code_scales": 0, "guess_at": 0}
    return {
        "features": int(guesses.features),
        "rows": guesses.codes.shape[1],
        "codes": guesses.codes.data_ptr(),
        "code_scales": guesses.scales.data_ptr(),
        "guess_at": guess_at,
    }


@njit(forceinline=True)
def sample_codes(a, sample):
    """Addresses of a sample's (codes, scales)."""
    return a.codes + sample * a.rows, a.code_scales + sample * ((a.rows + TILE - 1) // TILE) * 2


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
