"""A sample's guesses, and blocks of 16 elements without them or of nothing else.

Shape legend: n elements per sample, R rows of m elements.
"""

from __future__ import annotations

from functools import cache

from numba import njit
from numba.core import types
from numba.extending import intrinsic

from ..cpu.lanes import (
    between,
    by_kind,
    cast_load,
    cast_store,
    copy_bytes,
    element_bytes,
    tail_block,
)
from ..cpu.scalars import get_f32, get_i64, get_u8, get_u16, put_f32, put_i64, put_u16
from ..cpu.vectors import (
    FLOAT,
    I1,
    I16,
    LANES,
    constant,
    load_as_float32,
    load_lanes,
    splat,
    store_lanes,
    store_rounded,
    vector_of,
)
from ..derivative._cpu_lanes import apply_level
from ..topk.layout import TILE
from ._cpu_form import NO_GUESS, NUMBERS_AT, RESULT_AT, ROWS, TABLE, TAIL_AT, TOLD_AT


def lanes_of(builder, mask):
    return builder.bitcast(builder.trunc(mask, I16), vector_of(I1))


@cache
def _subtract(kind: str):
    """(address, guess, inside, destination): 16 elements less the float32 at ``guess`` where the bit is set, rounded
    to ``kind``."""

    @intrinsic
    def subtract(typingctx, address, guess, inside, destination):
        def codegen(context, builder, signature, args):
            numbers = builder.select(
                lanes_of(builder, args[2]), load_lanes(builder, args[1], FLOAT), constant(FLOAT, 0)
            )
            rest = builder.fsub(load_as_float32(builder, args[0], kind), numbers)
            store_rounded(builder, rest, args[3], kind)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64), codegen

    return subtract


@intrinsic
def _two_numbers(typingctx, first, second, later, destination):
    """(first, second, later, destination): 16 float32, ``second`` where the bit of ``later`` is set."""

    def codegen(context, builder, signature, args):
        chosen = builder.select(lanes_of(builder, args[2]), splat(builder, args[1]), splat(builder, args[0]))
        store_lanes(builder, chosen, args[3])
        return context.get_dummy_value()

    return types.void(types.float32, types.float32, types.int64, types.int64), codegen


@cache
def _select_numbers(kind: str):
    """(numbers, mask, destination): 16 float32 as ``kind``, zero where the bit is not set."""

    @intrinsic
    def select(typingctx, numbers, mask, destination):
        def codegen(context, builder, signature, args):
            numbers = load_lanes(builder, args[0], FLOAT)
            chosen = builder.select(lanes_of(builder, args[1]), numbers, constant(FLOAT, 0))
            store_rounded(builder, chosen, args[2], kind)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return select


subtract_block = by_kind(_subtract)
select_numbers = by_kind(_select_numbers)
_times_two_bits, _times_four_bits = apply_level("f32", 2), apply_level("f32", 4)


@njit(forceinline=True)
def row_of(i, inverse):
    """i // m, for ``inverse`` = 1 / m in float64: exact below 2^51."""
    return int((i + 0.5) * inverse)


@njit(forceinline=True)
def forget_numbers(spare):
    """Before the first block of a sample: what ``spare`` holds is of another."""
    put_i64(spare + NUMBERS_AT + LANES * 4 + 8, -1)


@njit(forceinline=True)
def block_numbers(fill, guess, start, spare):
    """Address of the 16 float32 that are the guesses of the elements from ``start`` on. Of rows, those of the block
    before are taken again while the row is the same."""
    table, length, inverse = guess.table, guess.length, guess.inverse
    numbers = spare + NUMBERS_AT
    row_from, row_to = numbers + LANES * 4, numbers + LANES * 4 + 8
    if fill == TABLE:
        return table + (start - row_of(start, inverse) * length) * 4
    if start + LANES <= get_i64(row_to) and start >= get_i64(row_from):
        return numbers
    row = row_of(start, inverse)
    here = (row + 1) * length - start
    later = 0 if here >= LANES else 0xFFFF & (0xFFFF << here)
    _two_numbers(get_f32(table + row * 4), get_f32(table + row * 4 + 4), later, numbers)
    put_i64(row_from, row * length)
    put_i64(row_to, (row + 1) * length if here >= LANES else -1)
    return numbers


@njit(forceinline=True)
def told_numbers(guess, numbers, n, block, spare):
    """Address of 16 float32: those at ``numbers`` times what the codes of a block's elements stand for."""
    levels, bits = guess.levels, guess.bits
    address, inside = guess.codes + block * LANES // 8 * bits, n - block * LANES
    if inside < LANES:  # no byte behind the sample's codes is read
        copy_bytes(address, spare + TAIL_AT, (inside * bits + 7) // 8)
        address = spare + TAIL_AT
    if bits == 2:
        _times_two_bits(numbers, address, levels, spare + TOLD_AT)
    else:
        _times_four_bits(numbers, address, levels, spare + TOLD_AT)
    return spare + TOLD_AT


@njit(forceinline=True)
def block_at(kind, fill, guess, source, n, block, spare):
    """Address of 16 readable elements less their guesses; what stands behind the sample's last one means nothing."""
    address = tail_block(kind, source, n, block, spare)
    if fill == NO_GUESS:
        return address
    numbers = block_numbers(fill, guess, block * LANES, spare)
    inside = 0xFFFF if guess.low != guess.low else between(kind, address, guess.low, guess.high)
    if guess.bits:
        numbers = told_numbers(guess, numbers, n, block, spare)
    subtract_block(kind, address, numbers, inside, spare + RESULT_AT)
    return spare + RESULT_AT


@njit(forceinline=True)
def fill_tile(kind, fill, guess, bits, start, n, out, spare):
    """Write the guesses of a tile from ``start`` on to the sample at ``out``, zero where the sample's ``bits``, if
    any, are zero."""
    size = element_bytes(kind)
    for block in range(start // LANES, (min(start + TILE, n) + LANES - 1) // LANES):
        first = block * LANES
        mask = 0xFFFF
        if bits:
            mask = get_u16(bits + block * 2) if first + 8 < n else get_u8(bits + block * 2)
        numbers = block_numbers(fill, guess, first, spare)
        if guess.bits:
            numbers = told_numbers(guess, numbers, n, block, spare)
        if first + LANES <= n:
            select_numbers(kind, numbers, mask, out + first * size)
        else:
            select_numbers(kind, numbers, mask, spare + RESULT_AT)
            copy_bytes(spare + RESULT_AT, out + first * size, (n - first) * size)


@njit(forceinline=True)
def add_half(kind, source, destination, spare):
    """Add the 16-bit element at ``source`` to the one at ``destination``, rounded once."""
    put_u16(spare, get_u16(source))
    put_u16(spare + 2, get_u16(destination))
    cast_load(kind, spare, spare + 64)
    put_f32(spare + 64, get_f32(spare + 64) + get_f32(spare + 68))
    cast_store(kind, spare + 64, spare)
    put_u16(destination, get_u16(spare))


@njit(forceinline=True)
def guess_table(fill, features, rows, n, means, table):
    """(address, period, 1 / period) of what ``block_numbers`` reads, from the means (R); ``table`` has room for n and
    ``SLACK`` numbers where rows are short."""
    length = n // rows
    if fill == ROWS:
        return means, length, 1.0 / length
    if features:
        for i in range(LANES):
            put_f32(means + (rows + i) * 4, get_f32(means + (i % rows) * 4))
        return means, rows, 1.0 / rows
    for i in range(n):
        put_f32(table + i * 4, get_f32(means + (i // length) * 4))
    return table, n, 1.0 / n
