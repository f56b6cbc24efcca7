"""How guesses are stored: one number per row of a sample, in 8 bits."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..topk.layout import TILE

SMALLEST = 1e-30  # a sum of squares below this counts as this
NO_GUESS, ROWS, FEATURES = 0, 1, 2  # how Triton kernels are told of guesses: none, of rows (B, R, m), of (B, m, R)


class Guesses(NamedTuple):
    """One guess per row of a sample: codes (B, R) int8 and scales (B, ceil(R / 256)) bfloat16, as of packed values.

    ``features``: the rows are the features of tokens (B, m, R), not rows (B, R, m). Only elements between ``low`` and
    ``high``, exclusively, are averaged and guessed: those whose bit the activation before keeps. NaN is no limit.

    Where the activation before keeps a code per element, ``known`` has those, (B, ceil(n * bits / 8)) uint8, and
    ``levels`` (2^bits) float32 the number that each code stands for: the guess is the row's number times the element's.
    """

    codes: Tensor
    scales: Tensor
    features: bool
    low: float = math.nan
    high: float = math.nan
    known: Tensor | None = None
    levels: Tensor | None = None

    @property
    def known_bits(self) -> int:
        """Bits of a code of ``known``; 0 without them."""
        return 0 if self.levels is None else self.levels.numel().bit_length() - 1

    def of_samples(self, start: int, stop: int) -> Guesses:
        """Those of samples start to stop."""
        known = None if self.known is None else self.known[start:stop]
        return self._replace(codes=self.codes[start:stop], scales=self.scales[start:stop], known=known)


def allocate(batch: int, rows: int, features: bool, low: float, high: float, device: torch.device) -> Guesses:
    """Uninitialised tensors of the right shapes."""
    codes = torch.empty((batch, rows), dtype=torch.int8, device=device)
    scales = torch.empty((batch, -(-rows // TILE)), dtype=torch.bfloat16, device=device)
    return Guesses(codes, scales, features, low, high)
