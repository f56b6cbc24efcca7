"""A tensor in 4 or 8 bits, each run of elements between its own smallest and largest: what a gated product keeps of its
factors, and the product read from them.

Shape legend: B samples, R runs of a sample, w elements of a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .packed import Form, Packed
from .rest import SMALLEST, decode_blocks, encode_blocks
from .roles import MEANS, label_codes, mark

# Elements of a run: below, scales and middles would take a third of the bytes; above, one large element costs many
# others their digits.
SHORTEST, BEST, LONGEST = 32, 64, 128


def _run_length(shape: tuple[int, ...]) -> int | None:
    """An even divisor of the innermost dimension or else of a sample, as near to ``BEST`` as there is."""
    for size in (shape[-1], math.prod(shape[1:])):
        divisors = [d for d in range(SHORTEST, LONGEST + 1, 2) if size % d == 0]
        if divisors:
            return min(divisors, key=lambda d: abs(d - BEST))
    return None


@dataclass(frozen=True, slots=True)
class Ranged:
    """``bits`` 4 or 8 per element, and per run the middle of its range in bfloat16 and a float16 scale."""

    bits: int

    def fits(self, x: Tensor) -> bool:
        """Whether x (B, ...) is large enough, and divides into runs."""
        return x.dim() > 1 and x.numel() >= SMALLEST and _run_length(tuple(x.shape)) is not None

    def form(self, x: Tensor) -> RangedForm:
        """How x (B, ...), which ``fits``, is going to be stored."""
        return RangedForm(tuple(x.shape), x.dtype, self.bits, _run_length(tuple(x.shape)))

    def pack(self, x: Tensor) -> Packed:
        """x (B, ...) of any strides, read in the order of its dimensions. A run with a number that is not finite has a
        scale that is not."""
        form = self.form(x)
        runs = x.reshape(-1, form.run)
        low, high = runs.aminmax(dim=1)
        middle = (low.float() + high.float()).mul_(0.5).to(torch.bfloat16)
        codes, scales = encode_blocks(runs, middle.float(), self.bits)
        parts = label_codes(codes, scales, x.shape[0])
        return Packed((*parts, mark(middle.view(parts[1].shape), MEANS)), form)


@dataclass(frozen=True, slots=True)
class RangedForm(Form):
    """Codes (B, R w bits / 8), scales (B, R) and middles (B, R)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    bits: int
    run: int

    @property
    def count(self) -> int:
        return 3

    def read(self, tensors: tuple[Tensor, ...], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        codes, scales, middles = (part[start:stop] for part in tensors)
        runs = codes.reshape(scales.numel(), -1), scales.reshape(-1)
        dense = decode_blocks(*runs, self.run, self.bits, dtype)
        return dense.add_(middles.reshape(-1, 1)).view(stop - start, *self.shape[1:])


@dataclass(frozen=True, slots=True)
class ProductForm(Form):
    """The product of two packed tensors of one shape. Stored are the tensors of both, one after the other."""

    left: RangedForm
    right: RangedForm

    @property
    def shape(self) -> tuple[int, ...]:
        return self.left.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    @property
    def count(self) -> int:
        return self.left.count + self.right.count

    def read(self, tensors: tuple[Tensor, ...], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        left = self.left.read(tensors[: self.left.count], start, stop, dtype)
        return left.mul_(self.right.read(tensors[self.left.count :], start, stop, dtype))
