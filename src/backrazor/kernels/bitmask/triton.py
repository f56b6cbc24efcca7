"""One-bit masks on CUDA. Each program turns ``BYTES`` bytes of bits into eight times as many elements, or back; every
output is written by one program.

Shape legend: B samples, n elements per sample. Where n is a multiple of 8 the batch is one long row, so tiny
samples cost no idle lanes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import check_positions, from_float32, launch, to_float32
from .layout import mask_bytes

BYTES = 256  # 2,048 elements per program: 16 per thread with four warps
WARPS = 4


@triton.jit
def _block(n, blocks, BYTES: tl.constexpr):
    """(sample, first byte of its row) of this program, int64; offsets of its elements and whether each lies inside the
    sample."""
    program = tl.program_id(0).to(tl.int64)
    sample, first = program // blocks, (program % blocks) * BYTES
    element = tl.arange(0, BYTES)[:, None] * 8 + tl.arange(0, 8)[None, :]
    return sample, first, element, element < n - first * 8


@triton.jit
def _encode(x, bits, n, blocks, low, high, BYTES: tl.constexpr):
    sample, first, element, inside = _block(n, blocks, BYTES)
    value = to_float32(tl.load(x + sample * n + first * 8 + element, mask=inside, other=0))
    one = tl.where(inside, tl.where((value <= low) | (value >= high), 0, 1), 0)
    packed = tl.sum(one << tl.arange(0, 8)[None, :], axis=1)
    byte = first + tl.arange(0, BYTES)
    row = (n + 7) // 8
    tl.store(bits + sample * row + byte, packed.to(tl.uint8), mask=byte < row)


@triton.jit
def _apply(grad, bits, out, n, blocks, BYTES: tl.constexpr):
    sample, first, element, inside = _block(n, blocks, BYTES)
    byte = first + tl.arange(0, BYTES)
    row = (n + 7) // 8
    packed = tl.load(bits + sample * row + byte, mask=byte < row, other=0).to(tl.int32)
    one = (packed[:, None] >> tl.arange(0, 8)[None, :]) & 1
    at = sample * n + first * 8 + element
    value = tl.load(grad + at, mask=inside & (one == 1), other=0)  # dropped gradients are not even read
    tl.store(out + at, value, mask=inside)


@triton.jit
def _clamp(y, bits, n, blocks, low, high, BYTES: tl.constexpr):
    sample, first, element, inside = _block(n, blocks, BYTES)
    at = sample * n + first * 8 + element
    stored = tl.load(y + at, mask=inside, other=0)
    value = to_float32(stored)
    below, above = value <= low, value >= high  # a NaN is neither, and stays
    one = tl.where(inside & ~(below | above), 1, 0)
    packed = tl.sum(one << tl.arange(0, 8)[None, :], axis=1)
    byte = first + tl.arange(0, BYTES)
    row = (n + 7) // 8
    tl.store(bits + sample * row + byte, packed.to(tl.uint8), mask=byte < row)
    bound = from_float32(tl.where(below, low, high), stored.dtype)  # exact: the bounds are numbers of this type
    tl.store(y + at, bound, mask=inside & (below | above))


@triton.jit
def _scale(
    grad,
    bits,  # read if MASKED
    variance,  # (C,)
    weight,  # (C,), read if WEIGHTED
    out,
    n,
    channels,
    positions,
    blocks,
    eps,
    MASKED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BYTES: tl.constexpr,
):
    sample, first, element, inside = _block(n, blocks, BYTES)
    kept = inside
    if MASKED:
        byte = first + tl.arange(0, BYTES)
        row = (n + 7) // 8
        packed = tl.load(bits + sample * row + byte, mask=byte < row, other=0).to(tl.int32)
        kept = inside & (((packed[:, None] >> tl.arange(0, 8)[None, :]) & 1) == 1)
    start = first * 8
    channel = ((start % positions).to(tl.int32) + element) // positions  # positions < 2^31 - 2^15: see the host's side
    channel = (((start // positions) % channels).to(tl.int32) + channel) % channels
    scale = tl.rsqrt(to_float32(tl.load(variance + channel, mask=kept, other=1)) + eps)
    if WEIGHTED:
        scale *= to_float32(tl.load(weight + channel, mask=kept, other=0))
    scale = to_float32(from_float32(scale, out.dtype.element_ty))
    at = sample * n + start + element
    value = to_float32(tl.load(grad + at, mask=kept, other=0)) * scale
    tl.store(out + at, from_float32(tl.where(kept, value, 0.0), out.dtype.element_ty), mask=inside)


def _rows(batch: int, n: int) -> tuple[int, int, int]:
    """(rows, elements per row, programs per row)."""
    rows, length = (1, batch * n) if n % 8 == 0 else (batch, n)
    return rows, length, -(-length // (8 * BYTES))


def encode(x: Tensor, low: float, high: float) -> Tensor:
    """As ``reference.encode``; x contiguous. PyTorch rounds the bounds to x's type before it compares, so this does."""
    return _bits_of(_encode, x, low, high)


def clamp_(y: Tensor, low: float, high: float) -> Tensor:
    """As ``reference.clamp_``; y contiguous. The bounds are rounded as in ``encode``."""
    return _bits_of(_clamp, y, low, high)


def _bits_of(kernel, x: Tensor, low: float, high: float) -> Tensor:
    batch, n = x.shape
    bits = torch.empty(batch, mask_bytes(n), dtype=torch.uint8, device=x.device)
    # on the CPU whatever the default device is: reading a number back from a GPU would wait for it
    low, high = (float(torch.tensor(bound, dtype=x.dtype, device="cpu")) for bound in (low, high))
    if x.numel():
        rows, length, blocks = _rows(batch, n)
        launch(kernel, rows * blocks, x, bits, length, blocks, low, high, BYTES=BYTES, warps=WARPS)
    return bits


def apply(grad: Tensor, bits: Tensor) -> Tensor:
    """As ``reference.apply``; grad and bits contiguous."""
    batch, n = grad.shape
    out = torch.empty_like(grad)
    if grad.numel():
        rows, length, blocks = _rows(batch, n)
        launch(_apply, rows * blocks, grad, bits, out, length, blocks, BYTES=BYTES, warps=WARPS)
    return out


def scaled(grad: Tensor, bits: Tensor | None, variance: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """As ``reference.scaled`` to rounding; all contiguous."""
    out = torch.empty_like(grad)
    if grad.numel():
        channels, n = grad.shape[1], grad[0].numel()
        check_positions(n // channels, "a channel")
        rows, length, blocks = _rows(grad.shape[0], n)
        tensors = grad, grad if bits is None else bits, variance, variance if weight is None else weight, out
        constants = {"MASKED": bits is not None, "WEIGHTED": weight is not None, "BYTES": BYTES}
        launch(_scale, rows * blocks, *tensors, length, channels, n // channels, blocks, eps, **constants, warps=WARPS)
    return out
