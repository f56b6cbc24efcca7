"""Vector building blocks for the CPU kernels, written as LLVM IR through Numba intrinsics.

Numba's auto-vectoriser cannot express "compress the lanes that passed a comparison", which is what packing is. LLVM
can: ``llvm.experimental.vector.compress`` becomes one instruction on AVX-512 and a short generic sequence elsewhere, so
the same source is fast where the hardware allows it and correct everywhere. All functions work on blocks of 16 elements
at raw addresses; a *kind* names how the
elements are stored: "f32", "f16" or "bf16". The order of magnitudes is that of the bit pattern without its sign: for
finite numbers the order of |x|, with infinity above every number and NaN above infinity.
"""

from __future__ import annotations

from functools import cache

from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

LANES = 16

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_F16, _F32 = ir.HalfType(), ir.FloatType()


def _vec(element):
    return ir.VectorType(element, LANES)


def _splat(builder, value):
    vector = ir.Constant(_vec(value.type), ir.Undefined)
    vector = builder.insert_element(vector, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(
        vector, ir.Constant(_vec(value.type), ir.Undefined), ir.Constant(_vec(_I32), [0] * LANES)
    )


def _const(element, value):
    return ir.Constant(_vec(element), [value] * LANES)


def _load(builder, address, element):
    return builder.load(builder.inttoptr(address, _vec(element).as_pointer()), align=1)


def _store(builder, value, address):
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _load_magnitude(builder, address, kind):
    """|x| as the integer order of its bits, 16 lanes of i32."""
    if kind == "f32":
        return builder.and_(_load(builder, address, _I32), _const(_I32, 0x7FFFFFFF))
    return builder.zext(builder.and_(_load(builder, address, _I16), _const(_I16, 0x7FFF)), _vec(_I32))


def _load_float(builder, address, kind):
    """x as 16 lanes of float32 (exact for every kind)."""
    if kind == "f32":
        return _load(builder, address, _F32)
    if kind == "f16":
        return builder.fpext(_load(builder, address, _F16), _vec(_F32))
    wide = builder.zext(_load(builder, address, _I16), _vec(_I32))
    return builder.bitcast(builder.shl(wide, _const(_I32, 16)), _vec(_F32))


def _compress(builder, vector, mask, address):
    """Store the lanes of ``vector`` whose bit is set, in order, at ``address``; all 16 lanes are written, the rest is
    slack."""
    name = {_I8: "i8", _I32: "i32", _F32: "f32"}[vector.type.element]
    lanes = builder.bitcast(builder.trunc(mask, _I16), _vec(_I1))
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(vector.type, [vector.type, _vec(_I1), vector.type]),
        f"llvm.experimental.vector.compress.v{LANES}{name}",
    )
    packed = builder.call(function, [vector, lanes, ir.Constant(vector.type, ir.Undefined)])
    _store(builder, packed, address)


def _bits(builder, lanes):
    return builder.zext(builder.bitcast(lanes, _I16), _I64)


@cache
def compare_magnitude(kind: str):
    """(address, threshold) -> (greater, equal): two 16-bit masks of |x| against a threshold in bit order."""

    @intrinsic
    def compare(typingctx, address, threshold):
        def codegen(context, builder, signature, args):
            magnitude = _load_magnitude(builder, args[0], kind)
            limit = _splat(builder, builder.trunc(args[1], _I32))
            greater = _bits(builder, builder.icmp_signed(">", magnitude, limit))
            equal = _bits(builder, builder.icmp_signed("==", magnitude, limit))
            return context.make_tuple(builder, signature.return_type, (greater, equal))

        return types.UniTuple(types.int64, 2)(types.int64, types.int64), codegen

    return compare


@cache
def compress_magnitude(kind: str):
    """(address, mask, destination): the selected |x| bits, as int32, stored one after another."""

    @intrinsic
    def compress(typingctx, address, mask, destination):
        def codegen(context, builder, signature, args):
            _compress(builder, _load_magnitude(builder, args[0], kind), args[1], args[2])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return compress


@cache
def compress_value(kind: str):
    """(address, mask, destination): the selected x, as float32, stored one after another."""

    @intrinsic
    def compress(typingctx, address, mask, destination):
        def codegen(context, builder, signature, args):
            _compress(builder, _load_float(builder, args[0], kind), args[1], args[2])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return compress


@intrinsic
def compress_offset(typingctx, base, mask, destination):
    """(base, mask, destination): base + lane of the selected lanes, as uint8, stored one after another."""

    def codegen(context, builder, signature, args):
        lanes = ir.Constant(_vec(_I8), list(range(LANES)))
        offsets = builder.add(lanes, _splat(builder, builder.trunc(args[0], _I8)))
        _compress(builder, offsets, args[1], args[2])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@cache
def inside_mask(kind: str):
    """(address, low, high) -> 16-bit mask of not (x <= low or x >= high): NaN passes, as in PyTorch's threshold
    backward."""

    @intrinsic
    def inside(typingctx, address, low, high):
        def codegen(context, builder, signature, args):
            value = _load_float(builder, args[0], kind)
            above = builder.fcmp_unordered(">", value, _splat(builder, args[1]))
            below = builder.fcmp_unordered("<", value, _splat(builder, args[2]))
            return _bits(builder, builder.and_(above, below))

        return types.int64(types.int64, types.float32, types.float32), codegen

    return inside


@cache
def select_lanes(element_bytes: int):
    """(source, mask, destination): elements of 2 or 4 bytes where the bit is set, zero elsewhere."""
    element = {2: _I16, 4: _I32}[element_bytes]

    @intrinsic
    def select(typingctx, source, mask, destination):
        def codegen(context, builder, signature, args):
            lanes = builder.bitcast(builder.trunc(args[1], _I16), _vec(_I1))
            value = _load(builder, args[0], element)
            _store(builder, builder.select(lanes, value, _const(element, 0)), args[2])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return select


def _store_rounded(builder, value, address, kind):
    """16 float32 rounded to nearest even into ``kind``; 16-bit NaNs in one form."""
    is_nan = builder.fcmp_unordered("uno", value, value)
    if kind == "f32":
        _store(builder, value, address)
    elif kind == "f16":
        quiet = builder.bitcast(_const(_I32, 0x7FC00000), _vec(_F32))
        _store(builder, builder.fptrunc(builder.select(is_nan, quiet, value), _vec(_F16)), address)
    else:
        bits = builder.bitcast(value, _vec(_I32))
        odd = builder.and_(builder.lshr(bits, _const(_I32, 16)), _const(_I32, 1))
        rounded = builder.add(bits, builder.add(odd, _const(_I32, 0x7FFF)))
        chosen = builder.select(is_nan, _const(_I32, 0x7FC00000), rounded)
        _store(builder, builder.trunc(builder.lshr(chosen, _const(_I32, 16)), _vec(_I16)), address)


@cache
def store_float(kind: str):
    """(source, destination): 16 float32 at ``source`` as ``kind`` at ``destination``."""

    @intrinsic
    def store(typingctx, source, destination):
        def codegen(context, builder, signature, args):
            _store_rounded(builder, _load(builder, args[0], _F32), args[1], kind)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return store


@cache
def load_float(kind: str):
    """(source, destination): 16 elements of ``kind`` at ``source`` as float32 at ``destination``."""

    @intrinsic
    def load(typingctx, source, destination):
        def codegen(context, builder, signature, args):
            _store(builder, _load_float(builder, args[0], kind), args[1])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return load


def _broadcast(builder, address, index, element):
    offset = ir.Constant(_I64, index * element.width // 8 if isinstance(element, ir.IntType) else index * 4)
    pointer = builder.inttoptr(builder.add(address, offset), element.as_pointer())
    return _splat(builder, builder.load(pointer, align=1))


def _has_avx512() -> bool:
    """Whether Numba compiles for a processor whose one instruction permutes 16 floats by 16 indices."""
    return "+avx512f" in cpu_target.target_context.codegen()._tm_features.split(",")


def _search_16(builder, value, thresholds):
    """How many of 15 ascending thresholds each lane reaches, by bisection: four permutations and comparisons."""
    permute = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(_vec(_F32), [_vec(_F32), _vec(_I32)]),
        "llvm.x86.avx512.permvar.sf.512",
    )
    table = ir.Constant(_vec(_F32), ir.Undefined)
    for i in range(LANES - 1):
        pointer = builder.inttoptr(builder.add(thresholds, ir.Constant(_I64, 4 * i)), _F32.as_pointer())
        table = builder.insert_element(table, builder.load(pointer, align=1), ir.Constant(_I32, i))
    code = _const(_I32, 0)
    for half in (8, 4, 2, 1):
        middle = builder.call(permute, [table, builder.add(code, _const(_I32, half - 1))])
        reached = builder.fcmp_ordered(">=", value, middle)
        code = builder.select(reached, builder.add(code, _const(_I32, half)), code)
    return code


@cache
def encode_even(kind: str):
    """(address, per unit, destination): the 8-bit number of each lane's cell on an even grid about zero, clamp(floor(x
    * per_unit) + 128, 0, 255), as bytes; NaN gives 0. Exact where ``per_unit`` is a power of two."""

    @intrinsic
    def encode(typingctx, address, per_unit, destination):
        def codegen(context, builder, signature, args):
            scaled = builder.fmul(_load_float(builder, args[0], kind), _splat(builder, args[1]))
            low, high = _const(_F32, -128.0), _const(_F32, 127.0)
            scaled = builder.select(builder.fcmp_ordered(">", scaled, low), scaled, low)  # NaN, too, becomes low
            scaled = builder.select(builder.fcmp_ordered("<", scaled, high), scaled, high)
            floor = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(_vec(_F32), [_vec(_F32)]), f"llvm.floor.v{LANES}f32"
            )
            cell = builder.fptosi(builder.call(floor, [scaled]), _vec(_I32))
            _store(builder, builder.trunc(builder.add(cell, _const(_I32, 128)), _vec(_I8)), args[2])
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
            value = _load_float(builder, args[0], kind)
            if bits == 4 and _has_avx512():
                code = _search_16(builder, value, args[1])
            else:
                code = _const(_I32, 0)
                for i in range(2**bits - 1):
                    reached = builder.fcmp_ordered(">=", value, _broadcast(builder, args[1], i, _F32))
                    code = builder.sub(code, builder.sext(reached, _vec(_I32)))
            per_word = 32 // bits
            shifts = [bits * (lane % per_word) for lane in range(LANES)]
            code = builder.shl(code, ir.Constant(_vec(_I32), shifts))
            while code.type.count > LANES // per_word:  # or the two halves of each word together
                half, word = code.type.count // 2, per_word // (LANES // code.type.count)
                lower = [lane // (word // 2) * word + lane % (word // 2) for lane in range(half)]
                undefined = ir.Constant(code.type, ir.Undefined)
                picked = [
                    builder.shuffle_vector(
                        code, undefined, ir.Constant(ir.VectorType(_I32, half), [at + extra for at in lower])
                    )
                    for extra in (0, word // 2)
                ]
                code = builder.or_(*picked)
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
            words = [_broadcast(builder, args[1], word, _I32) for word in range(LANES // per_word)]
            packed = words[0]
            if len(words) == 2:
                first = [lane if lane < per_word else LANES + lane for lane in range(LANES)]
                packed = builder.shuffle_vector(words[0], words[1], ir.Constant(_vec(_I32), first))
            shifts = [bits * (lane % per_word) for lane in range(LANES)]
            code = builder.lshr(packed, ir.Constant(_vec(_I32), shifts))
            choices = [_broadcast(builder, args[2], i, _F32) for i in range(2**bits)]
            for bit in range(bits):  # a tree of selections, one bit of the code a level
                is_set = builder.icmp_signed("!=", builder.and_(code, _const(_I32, 1 << bit)), _const(_I32, 0))
                choices = [
                    builder.select(is_set, odd, even) for even, odd in zip(choices[::2], choices[1::2], strict=True)
                ]
            product = builder.fmul(_load_float(builder, args[0], kind), choices[0])
            _store_rounded(builder, product, args[3], kind)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64), codegen

    return apply


def _normalised(builder, address, mean, scale, kind):
    centred = builder.fsub(_load_float(builder, address, kind), _splat(builder, mean))
    return builder.fmul(centred, _splat(builder, scale))


@cache
def largest_normalised(kind: str):
    """(address, mean, rstd, mask) -> the largest bit pattern of |(x - mean) * rstd| among the lanes of the mask."""

    @intrinsic
    def largest(typingctx, address, mean, rstd, mask):
        def codegen(context, builder, signature, args):
            value = builder.bitcast(_normalised(builder, args[0], args[1], args[2], kind), _vec(_I32))
            lanes = builder.bitcast(builder.trunc(args[3], _I16), _vec(_I1))
            magnitude = builder.select(lanes, builder.and_(value, _const(_I32, 0x7FFFFFFF)), _const(_I32, 0))
            reduce = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(_I32, [_vec(_I32)]), "llvm.vector.reduce.umax.v16i32"
            )
            return builder.zext(builder.call(reduce, [magnitude]), _I64)

        return types.int64(types.int64, types.float32, types.float32, types.int64), codegen

    return largest


@cache
def quantise_normalised(kind: str, bits: int):
    """(address, mean, rstd, inverse, destination): round((x - mean) * rstd * inverse) to even, clamped, two's
    complement, 4 or 8 bits each."""

    @intrinsic
    def quantise(typingctx, address, mean, rstd, inverse, destination):
        def codegen(context, builder, signature, args):
            value = builder.fmul(_normalised(builder, args[0], args[1], args[2], kind), _splat(builder, args[3]))
            rint = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(_vec(_F32), [_vec(_F32)]), "llvm.rint.v16f32"
            )
            value = builder.call(rint, [value])
            for predicate, bound in (("<", float(2 ** (bits - 1) - 1)), (">", -float(2 ** (bits - 1) - 1))):
                limit = _const(_F32, bound)
                value = builder.select(builder.fcmp_ordered(predicate, value, limit), value, limit)
            code = builder.trunc(builder.fptosi(value, _vec(_I32)), _vec(_I8))
            if bits == 4:
                undefined = ir.Constant(_vec(_I8), ir.Undefined)
                eight = ir.VectorType(_I32, 8)
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
                code = builder.sext(_load(builder, args[0], _I8), _vec(_I32))
            else:
                eight = ir.VectorType(_I8, 8)
                packed = builder.load(builder.inttoptr(args[0], eight.as_pointer()), align=1)
                twice = ir.Constant(_vec(_I32), [lane // 2 for lane in range(LANES)])
                spread = builder.shuffle_vector(packed, ir.Constant(eight, ir.Undefined), twice)
                shifts = ir.Constant(_vec(_I32), [28 if lane % 2 == 0 else 24 for lane in range(LANES)])
                code = builder.ashr(builder.shl(builder.zext(spread, _vec(_I32)), shifts), _const(_I32, 28))
            value = builder.fmul(builder.sitofp(code, _vec(_F32)), _splat(builder, args[1]))
            _store_rounded(builder, value, args[2], kind)
            return context.get_dummy_value()

        return types.void(types.int64, types.float32, types.int64), codegen

    return expand


def _pointee(pointer_type):
    return {"i8": _I8, "i16": _I16, "i32": _I32, "i64": _I64, "f32": _F32}[pointer_type]


@cache
def peek(name: str):
    """(address) -> the scalar of type ``name`` there; integers come zero-extended to int64, floats as float32."""
    element = _pointee(name)
    result = types.float32 if name == "f32" else types.int64

    @intrinsic
    def read(typingctx, address):
        def codegen(context, builder, signature, args):
            value = builder.load(builder.inttoptr(args[0], element.as_pointer()), align=1)
            return value if name in ("f32", "i64") else builder.zext(value, _I64)

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
def fetch_add(typingctx, address, amount):
    """(address, amount) -> the int64 before an atomic addition: how threads take the next sample."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_or(typingctx, address, bits):
    """(address, bits): set bits of an int32 atomically."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], _I32.as_pointer())
        builder.atomic_rmw("or", pointer, builder.trunc(args[1], _I32), "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _unary_int(name):
    @intrinsic
    def function(typingctx, value):
        def codegen(context, builder, signature, args):
            return builder.ctpop(args[0]) if name == "ctpop" else builder.cttz(args[0], ir.Constant(_I1, 0))

        return types.int64(types.int64), codegen

    return function


popcount = _unary_int("ctpop")
trailing_zeros = _unary_int("cttz")


@intrinsic
def float_bits(typingctx, value):
    """float32 -> its bit pattern, zero-extended to int64."""

    def codegen(context, builder, signature, args):
        return builder.zext(builder.bitcast(args[0], _I32), _I64)

    return types.int64(types.float32), codegen


@intrinsic
def bits_float(typingctx, bits):
    """A bit pattern in the low half of an int64 -> float32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.trunc(args[0], _I32), _F32)

    return types.float32(types.int64), codegen


@intrinsic
def round_even(typingctx, value):
    """float32 rounded to the nearest integer, halves to even: torch.round."""

    def codegen(context, builder, signature, args):
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_F32, [_F32]), "llvm.rint.f32")
        return builder.call(function, [args[0]])

    return types.float32(types.float32), codegen


# Kinds as integers: a kernel's entry point passes one as a constant and LLVM prunes the other branches, so one source
# serves all.
F32, F16, BF16 = 0, 1, 2

_compare_f32, _compare_f16, _compare_bf16 = (compare_magnitude(kind) for kind in ("f32", "f16", "bf16"))
_magnitudes_f32, _magnitudes_f16, _magnitudes_bf16 = (compress_magnitude(kind) for kind in ("f32", "f16", "bf16"))
_values_f32, _values_f16, _values_bf16 = (compress_value(kind) for kind in ("f32", "f16", "bf16"))
_inside_f32, _inside_f16, _inside_bf16 = (inside_mask(kind) for kind in ("f32", "f16", "bf16"))
_select_16, _select_32 = select_lanes(2), select_lanes(4)
_store_f32, _store_f16, _store_bf16 = (store_float(kind) for kind in ("f32", "f16", "bf16"))
_load_f32, _load_f16, _load_bf16 = (load_float(kind) for kind in ("f32", "f16", "bf16"))

get_u8, get_u16, get_i32, get_i64, get_f32 = (peek(name) for name in ("i8", "i16", "i32", "i64", "f32"))
put_u8, put_u16, put_i32, put_i64, put_f32 = (poke(name) for name in ("i8", "i16", "i32", "i64", "f32"))


@njit(forceinline=True)
def element_bytes(kind):
    return 4 if kind == F32 else 2


@njit(forceinline=True)
def magnitude_masks(kind, address, threshold):
    if kind == F32:
        return _compare_f32(address, threshold)
    if kind == F16:
        return _compare_f16(address, threshold)
    return _compare_bf16(address, threshold)


@njit(forceinline=True)
def gather_magnitudes(kind, address, mask, destination):
    if kind == F32:
        _magnitudes_f32(address, mask, destination)
    elif kind == F16:
        _magnitudes_f16(address, mask, destination)
    else:
        _magnitudes_bf16(address, mask, destination)


@njit(forceinline=True)
def gather_values(kind, address, mask, destination):
    if kind == F32:
        _values_f32(address, mask, destination)
    elif kind == F16:
        _values_f16(address, mask, destination)
    else:
        _values_bf16(address, mask, destination)


@njit(forceinline=True)
def between(kind, address, low, high):
    if kind == F32:
        return _inside_f32(address, low, high)
    if kind == F16:
        return _inside_f16(address, low, high)
    return _inside_bf16(address, low, high)


@njit(forceinline=True)
def keep_lanes(kind, source, mask, destination):
    if kind == F32:
        _select_32(source, mask, destination)
    else:
        _select_16(source, mask, destination)


@njit(forceinline=True)
def cast_store(kind, source, destination):
    if kind == F32:
        _store_f32(source, destination)
    elif kind == F16:
        _store_f16(source, destination)
    else:
        _store_bf16(source, destination)


@njit(forceinline=True)
def cast_load(kind, source, destination):
    if kind == F32:
        _load_f32(source, destination)
    elif kind == F16:
        _load_f16(source, destination)
    else:
        _load_bf16(source, destination)


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
