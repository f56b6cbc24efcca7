"""Any float tensor in 8 bits: what becomes of the tensors that autograd would keep densely beside the drop-ins.

A tensor is cut into blocks of 64 to 512 elements in the order in which they lie in memory, by rows where that goes.
Each block is stored as int8 codes and a float16 scale, by the arithmetic of ``kernels/rowquant``. Sizes are known from
the shape alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import row_decode, row_encode
from .roles import QUANTISED, SCALES, mark

SMALLEST = 1024  # elements: below it the note of what was packed weighs as much as what it saves
FORMS = (torch.float32, torch.float16, torch.bfloat16)  # float64 stays dense, where it is asked for precision counts

_BLOCK = 256
# Blocks are multiplied by it first, so that float16 scales reach from 1e-7 to 100,000 of a block's largest magnitude.
_GAINS = {8: 64.0, 4: 4.0}


def block_width(n: int, row: int) -> int:
    """Elements of a block for a tensor of n, ``row`` of them to the innermost dimension: 256, or a divisor between 64
    and 512 that is near: of ``row`` if it has one, so that tokens of different magnitude share no scale, else of n.
    Without one 256, with a padded last block."""
    for size in (row, n) if isinstance(n, int) else (row,):  # else a compiler keeps n open
        divisors = [d for d in range(64, 513) if size % d == 0]
        if divisors:
            return min(divisors, key=lambda d: abs(d - _BLOCK))
    return _BLOCK


def encode_blocks(blocks: Tensor, middles: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(codes (R, bytes), scales (R,)) of blocks (R, width) less ``middles`` (R,) float32. A block that is not finite,
    or reaches 100,000, has a scale that is not."""
    return row_encode(blocks, middles, torch.full_like(middles, _GAINS[bits]), bits)


def decode_blocks(codes: Tensor, scales: Tensor, width: int, bits: int, dtype: torch.dtype) -> Tensor:
    """Blocks (R, width) of ``dtype``, without their middles."""
    wide = torch.float32 if dtype == torch.float16 else dtype  # which does not hold a large block times the gain
    gain = torch.full((width,), 1 / _GAINS[bits], dtype=wide, device=codes.device)
    return row_decode(codes, scales, width, bits, wide, gain).to(dtype)


def without_copies(x: Tensor) -> Tensor:
    """x without the repetitions that ``expand`` makes: every dimension of stride 0 cut to one element."""
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if stride == 0 and size > 1:
            x = x.narrow(dim, 0, 1)
    return x


def in_memory_order(x: Tensor) -> Tensor | None:
    """x (n elements, at least one) as the flat view (n,) of its storage; None where it leaves gaps there or repeats
    elements."""
    if x.is_contiguous():
        return x.view(-1)
    order = sorted(range(x.dim()), key=lambda dim: (x.stride(dim), x.shape[dim]), reverse=True)
    permuted = x.permute(order)
    return permuted.view(-1) if permuted.is_contiguous() else None


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a tensor is read from its blocks. ``strides`` are those of the tensor without repetitions."""

    shape: tuple[int, ...]
    whole: tuple[int, ...]  # the shape with repetitions
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> Blocks:
        """The form of x, which is read back with the strides that it has, or contiguous where it has gaps."""
        compact = without_copies(x)
        if in_memory_order(compact) is None:
            return cls(tuple(compact.shape), tuple(x.shape), _contiguous_strides(compact.shape), x.dtype)
        return cls(tuple(compact.shape), tuple(x.shape), tuple(compact.stride()), x.dtype)

    def read(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The tensor that stands for what was packed."""
        width = codes.shape[1]
        flat = decode_blocks(codes, scales, width, 8, self.dtype).view(-1)
        return flat.as_strided(self.shape, self.strides).expand(self.whole)


@dataclass(frozen=True, slots=True)
class Slice:
    """How a part of a packed tensor is read from its blocks: ``offset`` and ``strides`` count elements of it in memory
    order."""

    shape: tuple[int, ...]
    whole: tuple[int, ...]  # the shape with repetitions
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def read(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The part of the tensor that stands for what was packed."""
        flat, width = codes.view(torch.int8).view(-1), codes.shape[1]
        part = flat.as_strided(self.shape, self.strides, flat.storage_offset() + self.offset)
        places = torch.full((), self.offset, device=codes.device)
        for dim, (size, stride) in enumerate(zip(self.shape, self.strides, strict=True)):
            steps = torch.arange(size, device=codes.device) * stride
            places = places + steps.view(-1, *(1,) * (len(self.shape) - dim - 1))
        scale = scales.float()[places // width] / _GAINS[8]
        return (part.float() * scale).to(self.dtype).expand(self.whole)


def pack_blocks(x: Tensor, reason: str) -> tuple[Tensor, Tensor]:
    """(codes (R, width), scales (R,)) of a float tensor x; ``reason`` is what the ledger says of them.

    A block that is not finite, or reaches 100,000, has a scale that is not.
    """
    compact = without_copies(x.detach())
    flat = in_memory_order(compact)
    inner = range(compact.dim()) if flat is None else sorted(range(compact.dim()), key=compact.stride, reverse=True)
    row = next((compact.shape[dim] for dim in reversed(inner) if compact.shape[dim] > 1), 1)
    flat = compact.reshape(-1) if flat is None else flat
    width = block_width(flat.numel(), row)
    if flat.numel() % width:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % width))
    rows = flat.view(-1, width)
    codes, scales = encode_blocks(rows, rows.new_zeros(rows.shape[0], dtype=torch.float32), 8)
    return mark(codes, QUANTISED, reason), mark(scales, SCALES, reason)


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
