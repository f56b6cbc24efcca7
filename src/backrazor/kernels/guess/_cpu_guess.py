"""A sample's guesses, and blocks of 16 elements without them or of nothing else.

Shape legend: n elements per sample, R rows of m elements.
"""

from __future__ import annotations

from functools import cache

import numpy
from llvmlite import ir
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
    valid_lanes,
)
from ..cpu.scalars import get_f32, get_i64, get_u8, get_u16, put_f32, put_i64, put_u16
from ..cpu.vectors import (
    FLOAT,
    I1,
    I16,
    I64,
    LANES,
    constant,
    load_as_float32,
    load_lanes,
    mask_bits,
    splat,
    store_lanes,
    store_rounded,
    vector_of,
)
from ..topk.layout import TILE
from ._cpu_form import NO_GUESS, NUMBERS_AT, RESULT_AT, ROWS, SLACK, TABLE


def _lanes_of(builder, mask):
    return builder.bitcast(builder.trunc(mask, I16), vector_of(I1))


@cache
def _subtract(kind: str):
    """(address, guess, inside, destination): 16 elements less the float32 at ``guess`` where the bit is set, rounded
    to ``kind``."""

    @intrinsic
    def subtract(typingctx, address, guess, inside, destination):
        def codegen(context, builder, signature, args):
            numbers = builder.select(
                _lanes_of(builder, args[2]), load_lanes(builder, args[1], FLOAT), constant(FLOAT, 0)
            )
            rest = builder.fsub(load_as_float32(builder, args[0], kind), numbers)
            store_rounded(builder, rest, args[3], kind)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64), codegen

    return subtract


@cache
def _accumulate(kind: str):
    """(address, counted, sums, counts): add 16 elements, and ones, where the bit is set to the float32 there."""

    @intrinsic
    def accumulate(typingctx, address, counted, sums, counts):
        def codegen(context, builder, signature, args):
            lanes, zero = _lanes_of(builder, args[1]), constant(FLOAT, 0)
            value = builder.select(lanes, load_as_float32(builder, args[0], kind), zero)
            store_lanes(builder, builder.fadd(load_lanes(builder, args[2], FLOAT), value), args[2])
            one = builder.select(lanes, constant(FLOAT, 1), zero)
            store_lanes(builder, builder.fadd(load_lanes(builder, args[3], FLOAT), one), args[3])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64), codegen

    return accumulate


@cache
def _sum_four(kind: str):
    """(address, low, high, sums) -> how many of 64 elements lie between the limits; these are added to the 16 float32
    at ``sums``, four each."""

    @intrinsic
    def sum_four(typingctx, address, low, high, sums):
        def codegen(context, builder, signature, args):
            bytes_of_block = ir.Constant(I64, LANES * (4 if kind == "f32" else 2))
            address, parts, inside = args[0], [], []
            for _ in range(4):
                value = load_as_float32(builder, address, kind)
                above = builder.fcmp_unordered(">", value, splat(builder, args[1]))
                below = builder.fcmp_unordered("<", value, splat(builder, args[2]))
                lanes = builder.and_(above, below)
                parts.append(builder.select(lanes, value, constant(FLOAT, 0)))
                inside.append(builder.ctpop(mask_bits(builder, lanes)))
                address = builder.add(address, bytes_of_block)
            pairs = [builder.fadd(parts[0], parts[1]), builder.fadd(parts[2], parts[3])]
            total = builder.fadd(load_lanes(builder, args[3], FLOAT), builder.fadd(*pairs))
            store_lanes(builder, total, args[3])
            return builder.add(builder.add(inside[0], inside[1]), builder.add(inside[2], inside[3]))

        return types.int64(types.int64, types.float32, types.float32, types.int64), codegen

    return sum_four


@cache
def _add_four(kind: str):
    """(address, stride, sums): add 16 elements at ``address``, and at one, two and three strides behind it, to the
    float32 at ``sums``."""

    @intrinsic
    def add_four(typingctx, address, stride, sums):
        def codegen(context, builder, signature, args):
            address, parts = args[0], []
            for _ in range(4):
                parts.append(load_as_float32(builder, address, kind))
                address = builder.add(address, args[1])
            pairs = [builder.fadd(parts[0], parts[1]), builder.fadd(parts[2], parts[3])]
            store_lanes(builder, builder.fadd(load_lanes(builder, args[2], FLOAT), builder.fadd(*pairs)), args[2])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return add_four


@intrinsic
def _two_numbers(typingctx, first, second, later, destination):
    """(first, second, later, destination): 16 float32, ``second`` where the bit of ``later`` is set."""

    def codegen(context, builder, signature, args):
        chosen = builder.select(_lanes_of(builder, args[2]), splat(builder, args[1]), splat(builder, args[0]))
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
            chosen = builder.select(_lanes_of(builder, args[1]), numbers, constant(FLOAT, 0))
            store_rounded(builder, chosen, args[2], kind)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return select


subtract_block = by_kind(_subtract)
accumulate_block = by_kind(_accumulate)
sum_four_blocks = by_kind(_sum_four)
add_four_tokens = by_kind(_add_four)
select_numbers = by_kind(_select_numbers)


@njit(forceinline=True)
def _row_of(i, inverse):
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
    table, length, inverse = guess[0], guess[1], guess[2]
    numbers = spare + NUMBERS_AT
    row_from, row_to = numbers + LANES * 4, numbers + LANES * 4 + 8
    if fill == TABLE:
        return table + (start - _row_of(start, inverse) * length) * 4
    if start + LANES <= get_i64(row_to) and start >= get_i64(row_from):
        return numbers
    row = _row_of(start, inverse)
    here = (row + 1) * length - start
    later = 0 if here >= LANES else 0xFFFF & (0xFFFF << here)
    _two_numbers(get_f32(table + row * 4), get_f32(table + row * 4 + 4), later, numbers)
    put_i64(row_from, row * length)
    put_i64(row_to, (row + 1) * length if here >= LANES else -1)
    return numbers


@njit(forceinline=True)
def block_at(kind, fill, guess, source, n, block, spare):
    """Address of 16 readable elements less their guesses; what stands behind the sample's last one means nothing."""
    address = tail_block(kind, source, n, block, spare)
    if fill == NO_GUESS:
        return address
    numbers = block_numbers(fill, guess, block * LANES, spare)
    inside = 0xFFFF if guess[3] != guess[3] else between(kind, address, guess[3], guess[4])
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
def sample_means(kind, features, rows, source, n, low, high, sums, counts, spare):
    """The mean of each row of a sample, over the elements between ``low`` and ``high``, as float32 at ``sums``, 0 where
    there are none. ``counts`` has as much room: R and ``SLACK`` numbers."""
    length = n // rows
    blocks = ((rows if features else length) + LANES - 1) // LANES
    for i in range(rows + SLACK):
        put_f32(sums + i * 4, numpy.float32(0.0))
        put_f32(counts + i * 4, numpy.float32(0.0))
    size = element_bytes(kind)
    if features:
        start = 0
        while low != low and start + 4 < length:  # all count; a block may reach into the next token
            for block in range(blocks):
                address = source + (start * rows + block * LANES) * size
                add_four_tokens(kind, address, rows * size, sums + block * 64)
            start += 4
        for i in range(rows):
            put_f32(counts + i * 4, numpy.float32(start))
        for token in range(start, length):
            for block in range(blocks):
                at = token * rows + block * LANES
                address = tail_block(kind, source + at * size, n - at, 0, spare)
                counted = between(kind, address, low, high) & valid_lanes(rows, block)
                accumulate_block(kind, address, counted, sums + block * 64, counts + block * 64)
        for row in range(rows):
            _divide(sums + row * 4, get_f32(sums + row * 4), get_f32(counts + row * 4))
        return
    fours = length // (4 * LANES)
    for row in range(rows):
        for lane in range(2 * LANES):
            put_f32(counts + lane * 4, numpy.float32(0.0))
        inside = 0
        for four in range(fours):
            inside += sum_four_blocks(kind, source + (row * length + four * 4 * LANES) * size, low, high, counts)
        for block in range(fours * 4, blocks):
            at = row * length + block * LANES
            address = tail_block(kind, source + at * size, n - at, 0, spare)
            counted = between(kind, address, low, high) & valid_lanes(length, block)
            accumulate_block(kind, address, counted, counts, counts + 64)
        total, many = numpy.float32(0.0), numpy.float32(inside)
        for lane in range(LANES):
            total += get_f32(counts + lane * 4)
            many += get_f32(counts + 64 + lane * 4)
        _divide(sums + row * 4, total, many)


@njit(forceinline=True)
def _divide(address, total, many):
    put_f32(address, total / max(many, numpy.float32(1.0)))


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
