"""Blocks of 16 elements: comparing, selecting, compressing and casting, for each kind of element."""

from __future__ import annotations

from functools import cache

from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from .layout import F16, F32
from .scalars import get_i32, get_u8, get_u16, put_i32, put_u8, put_u16
from .vectors import (
    FLOAT,
    I1,
    I8,
    I16,
    I32,
    LANES,
    compress_lanes,
    constant,
    load_as_float32,
    load_lanes,
    load_magnitude,
    mask_bits,
    splat,
    store_lanes,
    store_rounded,
    vector_of,
)


@cache
def compare_magnitude(kind: str):
    """(address, threshold) -> (greater, equal): two 16-bit masks of |x| against a threshold in bit order."""

    @intrinsic
    def compare(typingctx, address, threshold):
        def codegen(context, builder, signature, args):
            magnitude = load_magnitude(builder, args[0], kind)
            limit = splat(builder, builder.trunc(args[1], I32))
            greater = mask_bits(builder, builder.icmp_signed(">", magnitude, limit))
            equal = mask_bits(builder, builder.icmp_signed("==", magnitude, limit))
            return context.make_tuple(builder, signature.return_type, (greater, equal))

        return types.UniTuple(types.int64, 2)(types.int64, types.int64), codegen

    return compare


def _compress_loaded(load, kind: str):
    """(address, mask, destination): the selected of what ``load`` makes of the elements, stored one after another."""

    @intrinsic
    def compress(typingctx, address, mask, destination):
        def codegen(context, builder, signature, args):
            compress_lanes(builder, load(builder, args[0], kind), args[1], args[2])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return compress


@cache
def compress_magnitude(kind: str):
    """(address, mask, destination): the selected |x| bits, as int32, stored one after another."""
    return _compress_loaded(load_magnitude, kind)


@cache
def compress_value(kind: str):
    """(address, mask, destination): the selected x, as float32, stored one after another."""
    return _compress_loaded(load_as_float32, kind)


@intrinsic
def compress_offset(typingctx, base, mask, destination):
    """(base, mask, destination): base + lane of the selected lanes, as uint8, stored one after another."""

    def codegen(context, builder, signature, args):
        lanes = ir.Constant(vector_of(I8), list(range(LANES)))
        offsets = builder.add(lanes, splat(builder, builder.trunc(args[0], I8)))
        compress_lanes(builder, offsets, args[1], args[2])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@cache
def inside_mask(kind: str):
    """(address, low, high) -> 16-bit mask of not (x <= low or x >= high): NaN passes, as in PyTorch's threshold
    backward."""

    @intrinsic
    def inside(typingctx, address, low, high):
        def codegen(context, builder, signature, args):
            value = load_as_float32(builder, args[0], kind)
            above = builder.fcmp_unordered(">", value, splat(builder, args[1]))
            below = builder.fcmp_unordered("<", value, splat(builder, args[2]))
            return mask_bits(builder, builder.and_(above, below))

        return types.int64(types.int64, types.float32, types.float32), codegen

    return inside


@cache
def select_lanes(element_bytes: int):
    """(source, mask, destination): elements of 2 or 4 bytes where the bit is set, zero elsewhere."""
    element = {2: I16, 4: I32}[element_bytes]

    @intrinsic
    def select(typingctx, source, mask, destination):
        def codegen(context, builder, signature, args):
            lanes = builder.bitcast(builder.trunc(args[1], I16), vector_of(I1))
            value = load_lanes(builder, args[0], element)
            store_lanes(builder, builder.select(lanes, value, constant(element, 0)), args[2])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return select


@cache
def store_float(kind: str):
    """(source, destination): 16 float32 at ``source`` as ``kind`` at ``destination``."""

    @intrinsic
    def store(typingctx, source, destination):
        def codegen(context, builder, signature, args):
            store_rounded(builder, load_lanes(builder, args[0], FLOAT), args[1], kind)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return store


@cache
def load_float(kind: str):
    """(source, destination): 16 elements of ``kind`` at ``source`` as float32 at ``destination``."""

    @intrinsic
    def load(typingctx, source, destination):
        def codegen(context, builder, signature, args):
            store_lanes(builder, load_as_float32(builder, args[0], kind), args[1])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return load


def by_kind(make, *settings):
    """``make(kind, *settings)`` of every kind as one function (kind, ...), inlined."""
    of_f32, of_f16, of_bf16 = (make(kind, *settings) for kind in ("f32", "f16", "bf16"))

    @njit(forceinline=True)
    def chosen(kind, *arguments):
        if kind == F32:
            return of_f32(*arguments)
        if kind == F16:
            return of_f16(*arguments)
        return of_bf16(*arguments)

    return chosen


magnitude_masks = by_kind(compare_magnitude)
gather_magnitudes = by_kind(compress_magnitude)
gather_values = by_kind(compress_value)
between = by_kind(inside_mask)
cast_store = by_kind(store_float)
cast_load = by_kind(load_float)
_select_16, _select_32 = select_lanes(2), select_lanes(4)


@njit(forceinline=True)
def element_bytes(kind):
    return 4 if kind == F32 else 2


@njit(forceinline=True)
def keep_lanes(kind, source, mask, destination):
    if kind == F32:
        _select_32(source, mask, destination)
    else:
        _select_16(source, mask, destination)


@njit(forceinline=True)
def tail_block(kind, source, n, block, spare):
    """Address of 16 readable elements: the source's own, or for the last partial block a zero-padded copy at
    ``spare``."""
    start = block * LANES
    size = element_bytes(kind)
    if start + LANES <= n:
        return source + start * size
    for lane in range(LANES):
        if size == 4:
            put_i32(spare + lane * 4, get_i32(source + (start + lane) * 4) if start + lane < n else 0)
        else:
            put_u16(spare + lane * 2, get_u16(source + (start + lane) * 2) if start + lane < n else 0)
    return spare


@njit(forceinline=True)
def valid_lanes(n, block):
    """16-bit mask of the lanes of a block that lie inside the sample."""
    left = n - block * LANES
    return 0xFFFF if left >= LANES else (1 << left) - 1


@njit(forceinline=True)
def copy_bytes(source, destination, count):
    for i in range(count):
        put_u8(destination + i, get_u8(source + i))
