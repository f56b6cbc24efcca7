"""What the Triton kernels share: launching, cutting work into chunks, float bits, exact rounding.

Offsets: where a program or a block begins is a 64-bit scalar, and what a lane adds to it fits 32 bits. So no tensor is
too large, and no lane pays for 64-bit arithmetic. A test reads the code of every kernel for it.

All arithmetic is chosen so that the GPU, Triton's interpreter and the PyTorch references agree to the bit: divisions
are the IEEE ones, no product is contracted with a sum (``enable_fp_fusion=False``), magnitudes are compared as
integers, so that NaN has a place in the order, and rounding to bfloat16 is integer arithmetic, since the interpreter
truncates.

No kernel is autotuned: timing candidates waits for the device, which would break graph capture. A kernel's
configurations (at most four) stand in its module and the host code picks by shape and type.
"""

from subprocess import CalledProcessError

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cuda_target import build_failure

INFINITY: tl.constexpr = tl.constexpr(0x7F800000)  # the bits of the float32 infinity; magnitudes above are NaN
_EVEN: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves a float32 no bits below the point
MAX_CHUNK = 1 << 15
FILLING_PROGRAMS = 1024  # about what keeps 132 multiprocessors busy at 8 programs each


def launch(kernel, programs: int, *arguments, warps: int, registers: int | None = None, **constants) -> None:
    """Run ``programs`` instances of ``kernel`` on the device and current stream of its first tensor; never waits for
    them. ``registers``: how many a thread may have, where the assembler would rather spill for occupancy's sake.

    Raises:
        RuntimeError: Triton cannot build what launches its kernels, see ``cuda_target``.
    """
    tensor = next(argument for argument in arguments if isinstance(argument, Tensor))
    options = {"num_warps": warps, "maxnreg": registers, "enable_fp_fusion": False}
    try:
        with torch.cuda.device_of(tensor):  # does nothing for the interpreter's CPU tensors
            kernel[(programs,)](*arguments, **constants, **options)
    except (OSError, RuntimeError, CalledProcessError) as error:
        reason = build_failure(error)
        if reason is None:
            raise
        raise RuntimeError(reason) from None


def check_positions(n: int, what: str) -> None:
    """Refuse what 32-bit positions cannot number.

    Raises:
        ValueError: n is 2^31 or nearly so.
    """
    if n >= (1 << 31) - MAX_CHUNK:
        raise ValueError(
            f"{what} of {n} elements is too large for the CUDA kernels: fewer than 2^31 - 2^15 are allowed, split it"
        )


def chunks_of(batch: int, n: int, block: int) -> tuple[int, int]:
    """(elements per chunk, chunks per sample): enough programs to fill the device and no more; a chunk is whole
    blocks.

    Raises:
        ValueError: a sample has 2^31 elements or nearly so: positions inside a sample are 32-bit.
    """
    check_positions(n, "a sample")
    wanted = -(-batch * n // FILLING_PROGRAMS)
    chunk = min(max(-(-wanted // block), 1) * block, MAX_CHUNK)
    return chunk, -(-n // chunk)


@triton.jit
def magnitude(x):
    """int32 that order like |x|: the bits without the sign. x: float32, float16, bfloat16, or int32 or int16 that hold
    their bits."""
    if x.dtype.primitive_bitwidth == 32:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        return x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF


@triton.jit
def to_float32(x):
    """x as float32, exactly."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def from_float32(x, dtype: tl.constexpr):
    """float32 x rounded to nearest, ties to even; 16-bit NaNs all take one form."""
    if dtype == tl.float16:
        return tl.where(x != x, float("nan"), x).to(tl.float16)
    elif dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, rounded).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x


@triton.jit
def lanes_left(n, first, BLOCK: tl.constexpr):
    """How many of the ``BLOCK`` elements from ``first`` (int64) on lie before n, int32."""
    return tl.minimum(n - first, BLOCK).to(tl.int32)


@triton.jit
def scale_of(largest, LIMIT: tl.constexpr, DTYPE: tl.constexpr):
    """(scale of DTYPE, zero below 2^-126; its reciprocal float32, or 0 where it has none) for int32 magnitudes
    ``largest`` of float32 that are to become ``LIMIT``."""
    scale = from_float32(
        tl.div_rn(largest.to(tl.float32, bitcast=True), tl.full(largest.shape, LIMIT, tl.float32)), DTYPE
    )
    exact = to_float32(scale)
    large = magnitude(exact) >= 0x00800000
    scale = from_float32(tl.where(large, exact, 0.0), DTYPE)
    usable = large & (magnitude(exact) < INFINITY)
    inverse = tl.div_rn(tl.full(largest.shape, 1.0, tl.float32), tl.where(usable, exact, 1.0))
    return scale, tl.where(usable, inverse, 0.0)


@triton.jit
def quantise(x, inverse, LIMIT: tl.constexpr, NAN_CODE: tl.constexpr):
    """int32 round(x * inverse), ties to even, within +-LIMIT. NaN (an infinity times zero, too) becomes NAN_CODE."""
    scaled = x * inverse
    scaled = tl.where(scaled != scaled, NAN_CODE, scaled)
    scaled = tl.minimum(tl.maximum(scaled, -LIMIT), LIMIT)  # before rounding: the trick below needs |scaled| < 2^22
    return ((scaled + _EVEN) - _EVEN).to(tl.int32)


@triton.jit
def sum_before(counts, number):
    """The sum of ``counts[:number]``, int32: what the chunks before this one hold. Read by every program anew, which
    saves a scan's launch."""
    total = tl.zeros((256,), tl.int32)
    for first in range(0, number, 256):
        at = first + tl.arange(0, 256)
        total += tl.load(counts + at, mask=at < number, other=0)
    return tl.sum(total, axis=0)
