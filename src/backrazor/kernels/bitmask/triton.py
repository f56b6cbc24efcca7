"""One-bit masks on CUDA. Each program turns ``BYTES`` bytes of bits into eight times as many elements, or back; every
output is written by one program.

Shape legend: B samples, n elements per sample. Where n is a multiple of 8 the batch is one long row, so tiny
samples cost no idle lanes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import launch, to_float32
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


def _rows(batch: int, n: int) -> tuple[int, int, int]:
    """(rows, elements per row, programs per row)."""
    rows, length = (1, batch * n) if n % 8 == 0 else (batch, n)
    return rows, length, -(-length // (8 * BYTES))


def encode(x: Tensor, low: float, high: float) -> Tensor:
    """As ``reference.encode``; x contiguous. PyTorch rounds the bounds to x's type before it compares, so this does."""
    batch, n = x.shape
    bits = torch.empty(batch, mask_bytes(n), dtype=torch.uint8, device=x.device)
    # on the CPU whatever the default device is: reading a number back from a GPU would wait for it
    low, high = (float(torch.tensor(bound, dtype=x.dtype, device="cpu")) for bound in (low, high))
    if x.numel():
        rows, length, blocks = _rows(batch, n)
        launch(_encode, rows * blocks, x, bits, length, blocks, low, high, BYTES=BYTES, warps=WARPS)
    return bits


def apply(grad: Tensor, bits: Tensor) -> Tensor:
    """As ``reference.apply``; grad and bits contiguous."""
    batch, n = grad.shape
    out = torch.empty_like(grad)
    if grad.numel():
        rows, length, blocks = _rows(batch, n)
        launch(_apply, rows * blocks, grad, bits, out, length, blocks, BYTES=BYTES, warps=WARPS)
    return out
