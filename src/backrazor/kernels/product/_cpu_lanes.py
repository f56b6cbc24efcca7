"""The inner loops of a product with a packed operand: sums of scaled vectors, transposed tiles, positions."""

from __future__ import annotations

from functools import cache

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ..cpu.vectors import (
    FLOAT,
    I8,
    I32,
    I64,
    LANES,
    compress_lanes,
    constant,
    load_as_float32,
    load_lanes,
    splat,
    store_lanes,
    vector_of,
)
from ._cpu_form import NIBBLE, SUBSETS, TABLES


def _number(value: int):
    return ir.Constant(I64, value)


def _word(builder, address, element):
    return builder.load(builder.inttoptr(address, element.as_pointer()), align=1)


def _loop(builder, name, first, last, carried, body):
    """``carried`` after ``body(i, carried)`` for i from ``first`` to ``last``, in registers all the while."""
    before = builder.basic_block
    inside, after = builder.append_basic_block(name), builder.append_basic_block(f"{name}.after")
    builder.cbranch(builder.icmp_signed("<", first, last), inside, after)
    builder.position_at_end(inside)
    i = builder.phi(I64)
    entering = [builder.phi(value.type) for value in carried]
    leaving = body(i, entering)
    end, following = builder.basic_block, builder.add(i, _number(1))
    for phi, start, step in zip([i, *entering], [first, *carried], [following, *leaving], strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(step, end)
    builder.cbranch(builder.icmp_signed("<", following, last), inside, after)
    builder.position_at_end(after)
    results = [builder.phi(value.type) for value in carried]
    for phi, start, step in zip(results, carried, leaving, strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(step, end)
    return results


@cache
def add_products(vectors: int):
    """(entries, starts, samples, entry pitch, start pitch, matrix, matrix pitch, sums): to ``vectors`` vectors of sums,
    add for each entry of each sample its value times the vectors of the matrix at its offset.

    An entry is an offset in bytes (uint32) and a float32; the two words at ``starts`` say which entries of a sample are
    meant; the pitches, in bytes, lead to the next sample's.
    """

    @intrinsic
    def add(typingctx, entries, starts, samples, entry_pitch, start_pitch, matrix, matrix_pitch, sums):
        def codegen(context, builder, signature, args):
            entries, starts, samples, entry_pitch, start_pitch, matrix, matrix_pitch, sums = args
            places = [builder.add(sums, _number(4 * LANES * v)) for v in range(vectors)]

            def of_sample(sample, totals):
                words = builder.add(starts, builder.mul(sample, start_pitch))
                first = builder.zext(_word(builder, words, I32), I64)
                last = builder.zext(_word(builder, builder.add(words, _number(4)), I32), I64)
                own = builder.add(entries, builder.mul(sample, entry_pitch))
                rows = builder.add(matrix, builder.mul(sample, matrix_pitch))

                def of_entry(i, totals):
                    entry = builder.add(own, builder.shl(i, _number(3)))
                    row = builder.add(rows, builder.zext(_word(builder, entry, I32), I64))
                    value = splat(builder, _word(builder, builder.add(entry, _number(4)), FLOAT))
                    return [  # one instruction where the processor has it
                        builder.fadd(
                            total,
                            builder.fmul(
                                value,
                                load_lanes(builder, builder.add(row, _number(4 * LANES * v)), FLOAT),
                                flags=("contract",),
                            ),
                            flags=("contract",),
                        )
                        for v, total in enumerate(totals)
                    ]

                return _loop(builder, "entry", first, last, totals, of_entry)

            totals = [load_lanes(builder, place, FLOAT) for place in places]
            totals = _loop(builder, "sample", _number(0), samples, totals, of_sample)
            for total, place in zip(totals, places, strict=True):
                store_lanes(builder, total, place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return add


@cache
def subset_sums(vectors: int):
    """(rows, pitch, table): the sums of all subsets of ``NIBBLE`` rows of ``vectors`` vectors, ``pitch`` bytes apart;
    row j is in the subsets whose bit j is set."""

    @intrinsic
    def tabulate(typingctx, rows, pitch, table):
        def codegen(context, builder, signature, args):
            rows, pitch, table = args
            for v in range(vectors):
                sums = [constant(FLOAT, 0.0)]
                for row in range(NIBBLE):
                    at = builder.add(rows, builder.add(builder.mul(pitch, _number(row)), _number(4 * LANES * v)))
                    added = load_lanes(builder, at, FLOAT)
                    sums += [added, *(builder.fadd(other, added) for other in sums[1:])]
                for subset, total in enumerate(sums):
                    store_lanes(builder, total, builder.add(table, _number(4 * LANES * (subset * vectors + v))))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return tabulate


@cache
def add_subsets(vectors: int):
    """(bits, number, tables, sums): to ``vectors`` vectors of sums, add ``number`` times what ``TABLES`` tables one
    after another hold for the subsets that ``bits`` name, ``NIBBLE`` bits each from the lowest on."""

    @intrinsic
    def add(typingctx, bits, number, tables, sums):
        def codegen(context, builder, signature, args):
            bits, number, tables, sums = args
            totals = None
            for which in range(TABLES):
                subset = builder.and_(builder.lshr(bits, _number(NIBBLE * which)), _number(SUBSETS - 1))
                entry = builder.add(tables, builder.mul(subset, _number(4 * LANES * vectors)))
                base = 4 * LANES * vectors * SUBSETS * which
                found = [
                    load_lanes(builder, builder.add(entry, _number(base + 4 * LANES * v)), FLOAT)
                    for v in range(vectors)
                ]
                if totals is not None:
                    found = [builder.fadd(*pair) for pair in zip(totals, found, strict=True)]
                totals = found
            factor = splat(builder, number)
            for v, total in enumerate(totals):
                place = builder.add(sums, _number(4 * LANES * v))
                product = builder.fmul(factor, total, flags=("contract",))
                before = load_lanes(builder, place, FLOAT)
                store_lanes(builder, builder.fadd(before, product, flags=("contract",)), place)
            return context.get_dummy_value()

        return types.void(types.int64, types.float32, types.int64, types.int64), codegen

    return add


@cache
def transpose_tile(kind: str):
    """(source, pitch, destination): 16 rows of 16 elements, ``pitch`` bytes apart, as 16 float32 columns one after
    another."""

    @intrinsic
    def transpose(typingctx, source, pitch, destination):
        def codegen(context, builder, signature, args):
            source, pitch, destination = args
            rows = [
                load_as_float32(builder, builder.add(source, builder.mul(pitch, _number(row))), kind)
                for row in range(LANES)
            ]
            for step in (1, 2, 4, 8):  # swap what lies across the diagonal of every square of 2 * step
                low = [lane if not lane & step else LANES + lane - step for lane in range(LANES)]
                high = [lane + step if not lane & step else LANES + lane for lane in range(LANES)]
                swapped = list(rows)
                for row in range(LANES):
                    if not row & step:
                        pair = rows[row], rows[row + step]
                        swapped[row] = builder.shuffle_vector(*pair, ir.Constant(vector_of(I32), low))
                        swapped[row + step] = builder.shuffle_vector(*pair, ir.Constant(vector_of(I32), high))
                rows = swapped
            for column, values in enumerate(rows):
                store_lanes(builder, values, builder.add(destination, _number(4 * LANES * column)))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return transpose


@intrinsic
def widen_offsets(typingctx, source, base, destination):
    """(source, base, destination): 16 bytes as int32 with ``base`` added."""

    def codegen(context, builder, signature, args):
        offsets = builder.zext(load_lanes(builder, args[0], I8), vector_of(I32))
        store_lanes(builder, builder.add(offsets, splat(builder, builder.trunc(args[1], I32))), args[2])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def compress_positions(typingctx, base, mask, destination):
    """(base, mask, destination): base + lane of the selected lanes as int32, stored one after another."""

    def codegen(context, builder, signature, args):
        lanes = ir.Constant(vector_of(I32), list(range(LANES)))
        compress_lanes(builder, builder.add(lanes, splat(builder, builder.trunc(args[0], I32))), args[1], args[2])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen
