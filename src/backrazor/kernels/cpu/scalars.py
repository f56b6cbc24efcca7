"""Scalars at raw addresses, bits of numbers."""

from __future__ import annotations

from functools import cache

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .vectors import FLOAT, I1, I8, I16, I32, I64


def _pointee(pointer_type):
    return {"i8": I8, "i16": I16, "i32": I32, "i64": I64, "f32": FLOAT}[pointer_type]


@cache
def peek(name: str):
    """(address) -> the scalar of type ``name`` there; integers come zero-extended to int64, floats as float32."""
    element = _pointee(name)
    result = types.float32 if name == "f32" else types.int64

    @intrinsic
    def read(typingctx, address):
        def codegen(context, builder, signature, args):
            value = builder.load(builder.inttoptr(args[0], element.as_pointer()), align=1)
            return value if name in ("f32", "i64") else builder.zext(value, I64)

        return result(types.int64), codegen

    return read


@cache
def poke(name: str):
    """(address, value): store a scalar of type ``name``; integers are truncated."""
    element = _pointee(name)

    @intrinsic
    def write(typingctx, address, value):
        def codegen(context, builder, signature, args):
            value = args[1] if name in ("f32", "i64") else builder.trunc(args[1], element)
            builder.store(value, builder.inttoptr(args[0], element.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.float32 if name == "f32" else types.int64), codegen

    return write


@intrinsic
def atomic_or(typingctx, address, bits):
    """(address, bits): set bits of an int32 atomically."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], I32.as_pointer())
        builder.atomic_rmw("or", pointer, builder.trunc(args[1], I32), "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _unary_int(name):
    @intrinsic
    def function(typingctx, value):
        def codegen(context, builder, signature, args):
            return builder.ctpop(args[0]) if name == "ctpop" else builder.cttz(args[0], ir.Constant(I1, 0))

        return types.int64(types.int64), codegen

    return function


popcount = _unary_int("ctpop")
trailing_zeros = _unary_int("cttz")


@intrinsic
def float_bits(typingctx, value):
    """float32 -> its bit pattern, zero-extended to int64."""

    def codegen(context, builder, signature, args):
        return builder.zext(builder.bitcast(args[0], I32), I64)

    return types.int64(types.float32), codegen


@intrinsic
def bits_float(typingctx, bits):
    """A bit pattern in the low half of an int64 -> float32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.trunc(args[0], I32), FLOAT)

    return types.float32(types.int64), codegen


@intrinsic
def round_even(typingctx, value):
    """float32 rounded to the nearest integer, halves to even: torch.round."""

    def codegen(context, builder, signature, args):
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(FLOAT, [FLOAT]), "llvm.rint.f32")
        return builder.call(function, [args[0]])

    return types.float32(types.float32), codegen


get_u8, get_u16, get_i32, get_i64, get_f32 = (peek(name) for name in ("i8", "i16", "i32", "i64", "f32"))
put_u8, put_u16, put_i32, put_i64, put_f32 = (poke(name) for name in ("i8", "i16", "i32", "i64", "f32"))
