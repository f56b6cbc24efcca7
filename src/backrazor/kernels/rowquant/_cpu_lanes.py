"""Quantising rows and reading them back, for blocks of 16 elements."""

from __future__ import annotations

from functools import cache

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..cpu.vectors import (
    FLOAT,
    I1,
    I8,
    I16,
    I32,
    I64,
    LANES,
    constant,
    load_as_float32,
    load_lanes,
    splat,
    store_rounded,
    vector_of,
)


def _normalised(builder, address, mean, scale, kind):
    centred = builder.fsub(load_as_float32(builder, address, kind), splat(builder, mean))
    return builder.fmul(centred, splat(builder, scale))


@cache
def largest_normalised(kind: str):
    """(address, mean, rstd, mask) -> the largest bit pattern of |(x - mean) * rstd| among the lanes of the mask."""

    @intrinsic
    def largest(typingctx, address, mean, rstd, mask):
        def codegen(context, builder, signature, args):
            value = builder.bitcast(_normalised(builder, args[0], args[1], args[2], kind), vector_of(I32))
            lanes = builder.bitcast(builder.trunc(args[3], I16), vector_of(I1))
            magnitude = builder.select(lanes, builder.and_(value, constant(I32, 0x7FFFFFFF)), constant(I32, 0))
            reduce = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(I32, [vector_of(I32)]), "llvm.vector.reduce.umax.v16i32"
            )
            return builder.zext(builder.call(reduce, [magnitude]), I64)

        return types.int64(types.int64, types.float32, types.float32, types.int64), codegen

    return largest


@cache
def quantise_normalised(kind: str, bits: int):
    """(address, mean, rstd, inverse, destination): round((x - mean) * rstd * inverse) to even, clamped, two's
    complement, 4 or 8 bits each."""

    @intrinsic
    def quantise(typingctx, address, mean, rstd, inverse, destination):
        def codegen(context, builder, signature, args):
            value = builder.fmul(_normalised(builder, args[0], args[1], args[2], kind), splat(builder, args[3]))
            rint = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(vector_of(FLOAT), [vector_of(FLOAT)]), "llvm.rint.v16f32"
            )
            value = builder.call(rint, [value])
            for predicate, bound in (("<", float(2 ** (bits - 1) - 1)), (">", -float(2 ** (bits - 1) - 1))):
                limit = constant(FLOAT, bound)
                value = builder.select(builder.fcmp_ordered(predicate, value, limit), value, limit)
            code = builder.trunc(builder.fptosi(value, vector_of(I32)), vector_of(I8))
            if bits == 4:
                undefined = ir.Constant(vector_of(I8), ir.Undefined)
                eight = ir.VectorType(I32, 8)
                low = builder.shuffle_vector(code, undefined, ir.Constant(eight, list(range(0, 16, 2))))
                high = builder.shuffle_vector(code, undefined, ir.Constant(eight, list(range(1, 16, 2))))
                low = builder.and_(low, ir.Constant(low.type, [15] * 8))
                code = builder.or_(low, builder.shl(high, ir.Constant(high.type, [4] * 8)))
            builder.store(code, builder.inttoptr(args[4], code.type.as_pointer()), align=1)
            return context.get_dummy_value()

        floats = (types.float32,) * 3
        return types.void(types.int64, *floats, types.int64), codegen

    return quantise


@cache
def dequantise(kind: str, bits: int):
    """(codes, scale, destination): 16 two's complement codes of 4 or 8 bits times a float32 scale, as ``kind``."""

    @intrinsic
    def expand(typingctx, codes, scale, destination):
        def codegen(context, builder, signature, args):
            if bits == 8:
                code = builder.sext(load_lanes(builder, args[0], I8), vector_of(I32))
            else:
                eight = ir.VectorType(I8, 8)
                packed = builder.load(builder.inttoptr(args[0], eight.as_pointer()), align=1)
                twice = ir.Constant(vector_of(I32), [lane // 2 for lane in range(LANES)])
                spread = builder.shuffle_vector(packed, ir.Constant(eight, ir.Undefined), twice)
                shifts = ir.Constant(vector_of(I32), [28 if lane % 2 == 0 else 24 for lane in range(LANES)])
                code = builder.ashr(builder.shl(builder.zext(spread, vector_of(I32)), shifts), constant(I32, 28))
            value = builder.fmul(builder.sitofp(code, vector_of(FLOAT)), splat(builder, args[1]))
            store_rounded(builder, value, args[2], kind)
            return context.get_dummy_value()

        return types.void(types.int64, types.float32, types.int64), codegen

    return expand
