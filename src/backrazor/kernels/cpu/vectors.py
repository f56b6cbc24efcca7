"""What the intrinsics are written with: LLVM IR for blocks of 16 lanes at raw addresses."""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from .layout import LANES

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
HALF, FLOAT = ir.HalfType(), ir.FloatType()


def vector_of(element):
    return ir.VectorType(element, LANES)


def splat(builder, value):
    vector = ir.Constant(vector_of(value.type), ir.Undefined)
    vector = builder.insert_element(vector, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(
        vector, ir.Constant(vector_of(value.type), ir.Undefined), ir.Constant(vector_of(I32), [0] * LANES)
    )


def constant(element, value):
    return ir.Constant(vector_of(element), [value] * LANES)


def load_lanes(builder, address, element):
    return builder.load(builder.inttoptr(address, vector_of(element).as_pointer()), align=1)


def store_lanes(builder, value, address):
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def load_magnitude(builder, address, kind):
    """|x| as the integer order of its bits, 16 lanes of i32."""
    if kind == "f32":
        return builder.and_(load_lanes(builder, address, I32), constant(I32, 0x7FFFFFFF))
    return builder.zext(builder.and_(load_lanes(builder, address, I16), constant(I16, 0x7FFF)), vector_of(I32))


def load_as_float32(builder, address, kind):
    """x as 16 lanes of float32 (exact for every kind)."""
    if kind == "f32":
        return load_lanes(builder, address, FLOAT)
    if kind == "f16":
        return builder.fpext(load_lanes(builder, address, HALF), vector_of(FLOAT))
    wide = builder.zext(load_lanes(builder, address, I16), vector_of(I32))
    return builder.bitcast(builder.shl(wide, constant(I32, 16)), vector_of(FLOAT))


def compress_lanes(builder, vector, mask, address):
    """Store the lanes of ``vector`` whose bit is set, in order, at ``address``; all 16 lanes are written, the rest is
    slack."""
    name = {I8: "i8", I32: "i32", FLOAT: "f32"}[vector.type.element]
    lanes = builder.bitcast(builder.trunc(mask, I16), vector_of(I1))
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(vector.type, [vector.type, vector_of(I1), vector.type]),
        f"llvm.experimental.vector.compress.v{LANES}{name}",
    )
    packed = builder.call(function, [vector, lanes, ir.Constant(vector.type, ir.Undefined)])
    store_lanes(builder, packed, address)


def mask_bits(builder, lanes):
    return builder.zext(builder.bitcast(lanes, I16), I64)


def store_rounded(builder, value, address, kind):
    """16 float32 rounded to nearest even into ``kind``; 16-bit NaNs in one form."""
    is_nan = builder.fcmp_unordered("uno", value, value)
    if kind == "f32":
        store_lanes(builder, value, address)
    elif kind == "f16":
        quiet = builder.bitcast(constant(I32, 0x7FC00000), vector_of(FLOAT))
        store_lanes(builder, builder.fptrunc(builder.select(is_nan, quiet, value), vector_of(HALF)), address)
    else:
        bits = builder.bitcast(value, vector_of(I32))
        odd = builder.and_(builder.lshr(bits, constant(I32, 16)), constant(I32, 1))
        rounded = builder.add(bits, builder.add(odd, constant(I32, 0x7FFF)))
        chosen = builder.select(is_nan, constant(I32, 0x7FC00000), rounded)
        store_lanes(builder, builder.trunc(builder.lshr(chosen, constant(I32, 16)), vector_of(I16)), address)


def broadcast(builder, address, index, element):
    offset = ir.Constant(I64, index * element.width // 8 if isinstance(element, ir.IntType) else index * 4)
    pointer = builder.inttoptr(builder.add(address, offset), element.as_pointer())
    return splat(builder, builder.load(pointer, align=1))
