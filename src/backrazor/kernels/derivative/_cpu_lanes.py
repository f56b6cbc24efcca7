"""Codes of a quantised derivative for blocks of 16 elements, and the gradient they give."""

from __future__ import annotations

from functools import cache

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..cpu.target import has_avx512
from ..cpu.vectors import (
    FLOAT,
    I8,
    I32,
    I64,
    LANES,
    broadcast,
    constant,
    load_as_float32,
    splat,
    store_lanes,
    store_rounded,
    vector_of,
)


def _search_16(builder, value, thresholds):
    """How many of 15 ascending thresholds each lane reaches, by bisection: four permutations and comparisons."""
    permute = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(vector_of(FLOAT), [vector_of(FLOAT), vector_of(I32)]),
        "llvm.x86.avx512.permvar.sf.512",
    )
    eight = ir.VectorType(FLOAT, 8).as_pointer()
    first, last = (
        builder.load(builder.inttoptr(builder.add(thresholds, ir.Constant(I64, 4 * i)), eight), align=1) for i in (0, 7)
    )
    lanes = [*range(8), *range(9, 16), 15]  # the second eight begin with the last of the first
    table = builder.shuffle_vector(first, last, ir.Constant(vector_of(I32), lanes))
    code = constant(I32, 0)
    for half in (8, 4, 2, 1):
        middle = builder.call(permute, [table, builder.add(code, constant(I32, half - 1))])
        reached = builder.fcmp_ordered(">=", value, middle)
        code = builder.select(reached, builder.add(code, constant(I32, half)), code)
    return code


@cache
def encode_even(kind: str):
    """(address, per unit, destination): the 8-bit number of each lane's cell on an even grid about zero, clamp(floor(x
    * per_unit) + 128, 0, 255), as bytes; NaN gives 0. Exact where ``per_unit`` is a power of two."""

    @intrinsic
    def encode(typingctx, address, per_unit, destination):
        def codegen(context, builder, signature, args):
            scaled = builder.fmul(load_as_float32(builder, args[0], kind), splat(builder, args[1]))
            low, high = constant(FLOAT, -128.0), constant(FLOAT, 127.0)
            scaled = builder.select(builder.fcmp_ordered(">", scaled, low), scaled, low)  # NaN, too, becomes low
            scaled = builder.select(builder.fcmp_ordered("<", scaled, high), scaled, high)
            floor = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(vector_of(FLOAT), [vector_of(FLOAT)]), f"llvm.floor.v{LANES}f32"
            )
            cell = builder.fptosi(builder.call(floor, [scaled]), vector_of(I32))
            store_lanes(builder, builder.trunc(builder.add(cell, constant(I32, 128)), vector_of(I8)), args[2])
            return context.get_dummy_value()

        return types.void(types.int64, types.float32, types.int64), codegen

    return encode


@cache
def encode_level(kind: str, bits: int):
    """(address, thresholds, destination): the number of thresholds (2^bits - 1 ascending float32) that x reaches,
    ``bits`` wide, packed.

    The code of element i takes bits [i * bits, (i + 1) * bits) of the little-endian result; NaN gives 0. bits is 2 or
    4.
    """

    @intrinsic
    def encode(typingctx, address, thresholds, destination):
        def codegen(context, builder, signature, args):
            value = load_as_float32(builder, args[0], kind)
            if bits == 4 and has_avx512():
                code = _search_16(builder, value, args[1])
            else:
                code = constant(I32, 0)
                for i in range(2**bits - 1):
                    reached = builder.fcmp_ordered(">=", value, broadcast(builder, args[1], i, FLOAT))
                    code = builder.sub(code, builder.sext(reached, vector_of(I32)))
            per_byte = 8 // bits
            word = ir.VectorType(ir.IntType(8 * per_byte), LANES // per_byte)
            code = together = builder.bitcast(builder.trunc(code, vector_of(I8)), word)
            for place in range(1, per_byte):
                shift = ir.Constant(word, [place * (8 - bits)] * word.count)
                together = builder.or_(together, builder.lshr(code, shift))
            code = builder.trunc(together, ir.VectorType(I8, word.count))
            builder.store(code, builder.inttoptr(args[2], code.type.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return encode


@cache
def apply_level(kind: str, bits: int):
    """(gradient, codes, levels, destination): gradient times the float32 level (of 2^bits) that each code names. bits
    is 2 or 4."""

    @intrinsic
    def apply(typingctx, gradient, codes, levels, destination):
        def codegen(context, builder, signature, args):
            per_word = 32 // bits
            words = [broadcast(builder, args[1], word, I32) for word in range(LANES // per_word)]
            packed = words[0]
            if len(words) == 2:
                first = [lane if lane < per_word else LANES + lane for lane in range(LANES)]
                packed = builder.shuffle_vector(words[0], words[1], ir.Constant(vector_of(I32), first))
            shifts = [bits * (lane % per_word) for lane in range(LANES)]
            code = builder.lshr(packed, ir.Constant(vector_of(I32), shifts))
            choices = [broadcast(builder, args[2], i, FLOAT) for i in range(2**bits)]
            for bit in range(bits):  # a tree of selections, one bit of the code per level
                is_set = builder.icmp_signed("!=", builder.and_(code, constant(I32, 1 << bit)), constant(I32, 0))
                choices = [
                    builder.select(is_set, odd, even) for even, odd in zip(choices[::2], choices[1::2], strict=True)
                ]
            product = builder.fmul(load_as_float32(builder, args[0], kind), choices[0])
            store_rounded(builder, product, args[3], kind)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64), codegen

    return apply
