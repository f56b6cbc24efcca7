"""The number of each row of a sample that guesses are made of: a mean, or a factor of what codes stand for.

Shape legend: n elements per sample, R rows of m elements.
"""

from __future__ import annotations

from functools import cache

import numpy
from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from ..cpu.lanes import between, by_kind, element_bytes, tail_block, valid_lanes
from ..cpu.scalars import get_f32, put_f32
from ..cpu.vectors import FLOAT, I64, LANES, constant, load_as_float32, load_lanes, mask_bits, splat, store_lanes
from ._cpu_form import NUMBERS_AT, ONES_AT, RESULT_AT, SLACK
from ._cpu_guess import lanes_of, row_of, told_numbers
from .layout import SMALLEST


@cache
def _accumulate(kind: str):
    """(address, counted, sums, counts): add 16 elements, and ones, where the bit is set to the float32 there."""

    @intrinsic
    def accumulate(typingctx, address, counted, sums, counts):
        def codegen(context, builder, signature, args):
            lanes, zero = lanes_of(builder, args[1]), constant(FLOAT, 0)
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


@cache
def _weigh(kind: str):
    """(address, numbers, counted, sums, squares): add 16 elements times the float32 at ``numbers``, and the squares of
    these, where the bit is set to the float32 there."""

    @intrinsic
    def weigh(typingctx, address, numbers, counted, sums, squares):
        def codegen(context, builder, signature, args):
            lanes, zero = lanes_of(builder, args[2]), constant(FLOAT, 0)
            number = builder.select(lanes, load_lanes(builder, args[1], FLOAT), zero)
            value = builder.select(lanes, load_as_float32(builder, args[0], kind), zero)
            for factor, total in ((value, args[3]), (number, args[4])):
                added = builder.fadd(load_lanes(builder, total, FLOAT), builder.fmul(factor, number))
                store_lanes(builder, added, total)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64, types.int64), codegen

    return weigh


accumulate_block = by_kind(_accumulate)
weigh_block = by_kind(_weigh)
sum_four_blocks = by_kind(_sum_four)
add_four_tokens = by_kind(_add_four)


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
def sample_factors(kind, features, rows, source, n, guess, sums, squares, spare):
    """The number of each row of a sample that, times what the codes of its elements stand for, comes closest to it, by
    least squares, as float32 at ``sums``. ``squares`` has as much room: R and ``SLACK`` numbers."""
    length = n // rows
    inverse = 1.0 / (rows if features else length)
    for i in range(rows + SLACK):
        put_f32(sums + i * 4, numpy.float32(0.0))
        put_f32(squares + i * 4, numpy.float32(0.0))
    for lane in range(LANES):
        put_f32(spare + ONES_AT + lane * 4, numpy.float32(1.0))
    part, square = spare + RESULT_AT, spare + NUMBERS_AT
    for block in range((n + LANES - 1) // LANES):
        start = block * LANES
        count = min(LANES, n - start)
        address = tail_block(kind, source, n, block, spare)
        numbers = told_numbers(guess, spare + ONES_AT, n, block, spare)
        group = row_of(start, inverse)
        at = start - group * (rows if features else length)
        if features and at + LANES <= rows:
            weigh_block(kind, address, numbers, (1 << count) - 1, sums + at * 4, squares + at * 4)
            continue
        for lane in range(LANES):
            put_f32(part + lane * 4, numpy.float32(0.0))
            put_f32(square + lane * 4, numpy.float32(0.0))
        weigh_block(kind, address, numbers, (1 << count) - 1, part, square)
        for lane in range(count):
            row = at if features else group
            put_f32(sums + row * 4, get_f32(sums + row * 4) + get_f32(part + lane * 4))
            put_f32(squares + row * 4, get_f32(squares + row * 4) + get_f32(square + lane * 4))
            at += 1
            if at == (rows if features else length):
                at = 0
                group += 1
    for row in range(rows):
        total = max(get_f32(squares + row * 4), numpy.float32(SMALLEST))
        put_f32(sums + row * 4, get_f32(sums + row * 4) / total)


@njit(forceinline=True)
def _divide(address, total, many):
    put_f32(address, total / max(many, numpy.float32(1.0)))
