"""What stands for an activation in its own backward: one bit per element, the derivative's code, or the input in 16
bits. Each multiplies a gradient.

Shape legend: B samples, n elements of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import bits_of
from ..kernels import level_apply, level_encode, mask_apply, mask_encode
from ..kernels.derivative.layout import code_bytes
from ..kernels.sealed import sealed
from .layouts import as_rows, from_rows, memory_format
from .packed import Form, Packed
from .roles import MASK, QUANTISED, mark
from .smooth import ACTIVATIONS, quantiser_on


@dataclass(frozen=True, slots=True)
class Bits:
    """One bit per element: the derivative is 1 in (low, high) and 0 elsewhere; a NaN ``high`` means no upper bound."""

    low: float = 0.0
    high: float = float("nan")
    role = MASK

    def encode(self, rows: Tensor) -> Tensor:
        """(B, n) -> uint8 (B, bytes)."""
        return mask_encode(rows, self.low, self.high)

    def times(self, grad: Tensor, codes: Tensor) -> Tensor:
        """A new tensor: ``grad`` (B, n) times the derivative."""
        return mask_apply(grad, codes)


@dataclass(frozen=True, slots=True)
class Levels:
    """The derivative of ``ACTIVATIONS[name]`` in 2^bits levels."""

    name: str
    bits: int
    role = QUANTISED

    def encode(self, rows: Tensor) -> Tensor:
        """(B, n) -> uint8 (B, bytes)."""
        return _level_codes(self, rows)[0]

    def times(self, grad: Tensor, codes: Tensor) -> Tensor:
        """A new tensor: ``grad`` (B, n) times the derivative."""
        return _level_times(self, grad, codes)[0]


# Sealed: in a compiled graph the tables would be constants.
@sealed(lambda codec, rows: (rows.new_empty(rows.shape[0], code_bytes(rows.shape[1], codec.bits), dtype=torch.uint8),))
def _level_codes(codec: Levels, rows: Tensor) -> tuple[Tensor]:
    thresholds, _ = quantiser_on(codec.name, codec.bits, rows.device)
    return (level_encode(rows, thresholds, codec.bits),)


@sealed(lambda codec, grad, codes: (torch.empty_like(grad),))
def _level_times(codec: Levels, grad: Tensor, codes: Tensor) -> tuple[Tensor]:
    _, levels = quantiser_on(codec.name, codec.bits, grad.device)
    return (level_apply(grad, codes, levels, codec.bits),)


@dataclass(frozen=True, slots=True)
class Half:
    """The input of ``ACTIVATIONS[name]`` in float16; a 16-bit input in its own type."""

    name: str
    role = QUANTISED

    def encode(self, x: Tensor) -> Tensor:
        """x (B, ...) as it lies: the same tensor where it has 16 bits."""
        return x.to(torch.float16) if x.element_size() > 2 else x

    def times(self, grad: Tensor, half: Tensor) -> Tensor:
        """A new tensor: PyTorch's gradient at the rounded input."""
        return ACTIVATIONS[self.name].backward(grad, half.to(grad.dtype))


Derivative = Bits | Levels | Half


def smooth_word(name: str, word: str) -> str:
    """The word of the ``activation`` rule for ``ACTIVATIONS[name]``: "auto" is 2 bits for a GELU and 4 for what has a
    sharper derivative."""
    if word != "auto":
        return word
    return "int2" if "gelu" in name else "int4"


def smooth_codec(name: str, word: str) -> Levels | Half | None:
    """What the word of the ``activation`` rule means for ``ACTIVATIONS[name]``; None for "dense"."""
    word = smooth_word(name, word)
    if word == "dense":
        return None
    return Half(name) if word == "float16" else Levels(name, bits_of(word))


@dataclass(frozen=True, slots=True)
class DerivativeForm(Form):
    """One tensor of codes, (B, bytes); of ``Half``, the input itself."""

    shape: tuple[int, ...]
    codec: Derivative
    format: torch.memory_format = torch.contiguous_format

    @property
    def count(self) -> int:
        return 1

    def read(self, tensors: tuple[Tensor, ...], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        ones = tensors[0].new_ones((stop - start, *self.shape[1:]), dtype=dtype)
        return self.times(tensors, ones, start, stop)

    def times(self, tensors: tuple[Tensor, ...], grad: Tensor, start: int, stop: int) -> Tensor:
        """A new tensor: ``grad`` (stop - start, ...) times the derivative of these samples."""
        if isinstance(self.codec, Half):
            return self.codec.times(grad, tensors[0][start:stop] if self.shape else tensors[0])
        rows = self.codec.times(as_rows(grad, self.format), tensors[0][start:stop])
        return from_rows(rows, grad.shape, self.format)


def pack_derivative(x: Tensor, codec: Derivative) -> Packed:
    """What the backward of an activation of x (B, ...) reads."""
    form = DerivativeForm(tuple(x.shape), codec, memory_format(x))
    stored = codec.encode(x if isinstance(codec, Half) else as_rows(x, form.format))
    return Packed((mark(stored, codec.role),), form)


def times(grad: Tensor, packed: Packed, start: int = 0, stop: int | None = None) -> Tensor:
    """A new tensor: ``grad``, of samples start to stop, times the derivative that ``packed`` stands for."""
    if stop is None:
        stop = grad.shape[0] if grad.dim() else 1  # a scalar is one sample
    return packed.form.times(packed.tensors, grad, start, stop)
