"""Guesses at what is dropped, as operators."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import implementation
from ..operators import operator
from . import reference


@operator(
    "guess_means(Tensor x, int rows, bool features, float low, float high) -> Tensor",
    lambda x, rows, features, low, high: x.new_empty((x.shape[0], rows), dtype=torch.float32),
)
def guess_means(x: Tensor, rows: int, features: bool, low: float, high: float) -> Tensor:
    """(B, n) -> (B, R) float32, see ``reference``."""
    fast = implementation("guess", x)
    return (fast or reference).means(x.contiguous(), rows, features, low, high)


@operator(
    "guess_without(Tensor x, Tensor guess, bool features, float low, float high) -> Tensor",
    lambda x, guess, features, low, high: x.new_empty(x.shape),
)
def guess_without(x: Tensor, guess: Tensor, features: bool, low: float, high: float) -> Tensor:
    """A new tensor: (B, n) less ``guess`` (B, R) float32."""
    fast = implementation("guess", x)
    return (fast or reference).without(x.contiguous(), guess, features, low, high)


@operator(
    "guess_add_(Tensor(a!) out, Tensor guess, Tensor? bits, bool features) -> ()",
    lambda out, guess, bits, features: None,
)
def guess_add_(out: Tensor, guess: Tensor, bits: Tensor | None, features: bool) -> None:
    """contiguous (B, n) += ``guess`` (B, R) float32, where ``bits`` are set."""
    fast = implementation("guess", out)
    (fast or reference).add_(out, guess, None if bits is None else bits.contiguous(), features)
