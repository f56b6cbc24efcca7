"""The guesses of a batch as kernels are told of them: one int8 per row of a sample, and scales as of any values."""

from __future__ import annotations

from typing import NamedTuple

from ..cpu.layout import LANES
from .layout import Guesses

# Where an element's guess is found: nowhere; in its row's number, for rows of at least a block; in a table of one
# number per element that repeats (features over the tokens, short rows written out once per sample).
NO_GUESS, ROWS, TABLE = FILLS = 131, 132, 133
SLACK = 2 * LANES  # numbers that a vector may touch behind a table
# Behind a spare block: the elements less their guesses, a block of guesses, and the elements of whose row they are; a
# block of guesses times what their codes stand for, the codes of a last block, and 16 ones.
RESULT_AT, NUMBERS_AT = LANES * 4, 2 * LANES * 4
TOLD_AT = NUMBERS_AT + LANES * 4 + 16
TAIL_AT = TOLD_AT + LANES * 4
ONES_AT = TAIL_AT + LANES
SPARE_BYTES = ONES_AT + LANES * 4


class Guess:
    """Fields of an argument block that say where the guesses of a batch are."""

    features: int
    rows: int
    codes: int
    code_scales: int
    guess_at: int  # in a thread's scratch: room for ``guess_numbers`` float32
    known: int  # as ``Guesses`` says; without them ``known_bits`` is 0
    levels: int
    known_bits: int


class SampleGuess(NamedTuple):
    """The guesses of one sample, as compiled code hands them on. Addresses are of float32, but for ``codes``.

    Attributes:
        table: address of the rows' numbers, or of one number per element of a period.
        length: elements of a row, or of the period.
        inverse: 1 / length.
        low, high: only elements between them are guessed; NaN is no limit.
        codes: address of the known codes.
        levels: address of what these stand for.
        bits: of a known code; 0 without them.
    """

    table: int
    length: int
    inverse: float
    low: float
    high: float
    codes: int
    levels: int
    bits: int


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
        return dict.fromkeys(Guess.__annotations__, 0)
    return {
        "features": int(guesses.features),
        "rows": guesses.codes.shape[1],
        "codes": guesses.codes.data_ptr(),
        "code_scales": guesses.scales.data_ptr(),
        "guess_at": guess_at,
        "known": 0 if guesses.known is None else guesses.known.data_ptr(),
        "levels": 0 if guesses.levels is None else guesses.levels.data_ptr(),
        "known_bits": guesses.known_bits,
    }
