"""Quantised derivatives on CUDA. An element's interval is found by bisection: ``bits`` comparisons against thresholds
that stay in the first-level cache.

Shape legend: B samples, n elements per sample, 8 / bits elements per byte. Where rows end on whole bytes the batch
is one long row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import from_float32, launch, to_float32
from .layout import code_bytes

ELEMENTS = 2048  # a program: 16 elements per thread with four warps
WARPS = 4


@triton.jit
def _block(n, blocks, BITS: tl.constexpr, ELEMENTS: tl.constexpr):
    """(sample, first byte of its row) of this program, int64; offsets of its bytes, of its elements, and whether those
    lie inside the sample."""
    PER: tl.constexpr = 8 // BITS
    program = tl.program_id(0).to(tl.int64)
    sample, first = program // blocks, (program % blocks) * (ELEMENTS // PER)
    byte = tl.arange(0, ELEMENTS // PER)
    element = byte[:, None] * PER + tl.arange(0, PER)[None, :]
    return sample, first, byte, element, element < n - first * PER


@triton.jit
def _encode(x, thresholds, codes, n, blocks, BITS: tl.constexpr, ELEMENTS: tl.constexpr):
    PER: tl.constexpr = 8 // BITS
    sample, first, byte, element, inside = _block(n, blocks, BITS, ELEMENTS)
    value = to_float32(tl.load(x + sample * n + first * PER + element, mask=inside, other=0))
    code = tl.zeros((ELEMENTS // PER, PER), tl.int32)
    for halving in tl.static_range(BITS):
        step = 1 << (BITS - 1 - halving)
        # code + step - 1 <= 2^BITS - 2, the last threshold, whatever the value: no mask is needed
        code += tl.where(value >= tl.load(thresholds + (code + (step - 1))), step, 0)
    packed = tl.sum(tl.where(inside, code, 0) << (tl.arange(0, PER) * BITS)[None, :], axis=1)
    row = (n + PER - 1) // PER
    tl.store(codes + sample * row + first + byte, packed.to(tl.uint8), mask=first + byte < row)


@triton.jit
def _apply(grad, codes, levels, out, n, blocks, BITS: tl.constexpr, ELEMENTS: tl.constexpr):
    PER: tl.constexpr = 8 // BITS
    sample, first, byte, element, inside = _block(n, blocks, BITS, ELEMENTS)
    row = (n + PER - 1) // PER
    packed = tl.load(codes + sample * row + first + byte, mask=first + byte < row, other=0).to(tl.int32)
    code = (packed[:, None] >> (tl.arange(0, PER) * BITS)[None, :]) & ((1 << BITS) - 1)
    at = sample * n + first * PER + element
    product = to_float32(tl.load(grad + at, mask=inside, other=0)) * tl.load(levels + code)
    tl.store(out + at, from_float32(product, out.dtype.element_ty), mask=inside)


def _rows(batch: int, n: int, bits: int) -> tuple[int, int, int]:
    """(rows, elements per row, programs per row)."""
    rows, length = (1, batch * n) if n % (8 // bits) == 0 else (batch, n)
    return rows, length, -(-length // ELEMENTS)


def encode(x: Tensor, thresholds: Tensor, bits: int) -> Tensor:
    """As ``reference.encode``; x and thresholds contiguous."""
    batch, n = x.shape
    codes = torch.empty(batch, code_bytes(n, bits), dtype=torch.uint8, device=x.device)
    if x.numel():
        rows, length, blocks = _rows(batch, n, bits)
        launch(_encode, rows * blocks, x, thresholds, codes, length, blocks, BITS=bits, ELEMENTS=ELEMENTS, warps=WARPS)
    return codes


def apply(grad: Tensor, codes: Tensor, levels: Tensor, bits: int) -> Tensor:
    """As ``reference.apply``; grad, codes and levels contiguous."""
    batch, n = grad.shape
    out = torch.empty_like(grad)
    if grad.numel():
        rows, length, blocks = _rows(batch, n, bits)
        launch(
            _apply, rows * blocks, grad, codes, levels, out, length, blocks, BITS=bits, ELEMENTS=ELEMENTS, warps=WARPS
        )
    return out
