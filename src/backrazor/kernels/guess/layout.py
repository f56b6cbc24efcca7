"""How guesses are stored: one number per row of a sample, in 8 bits."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..topk.layout import TILE

NO_GUESS, ROWS, FEATURES = 0, 1, 2  # how Triton kernels are told of guesses: none, of rows (B, R, m), of (B, m, R)


class Guesses(NamedTuple):
    """One guess per row of a sample: codes (B, R) int8 and scales (B, ceil(R / 256)) bfloat16, as of packed values.

    ``features``: the rows are the features of tokens (B, m, R), not rows (B, R, m). Only elements between ``low`` and
    ``high``, exclusively, are averaged and guessed: those whose bit the activation before keeps. NaN is no limit.
    """

    codes: Tensor
    scales: Tensor
    features: bool
    low: float = math.nan
    high: float = math.nan

    def of_samples(self, start: int, stop: int) -> Guesses:
        """Those of samples start to stop."""
        return self._replace(codes=self.codes[start:stop], scales=self.scales[start:stop])


def allocate(batch: int, rows: int, features: bool, low: float, high: float, device: torch.device) -> Guesses:
    """Uninitialised tensors of the right shapes."""
    codes = torch.empty((batch, rows), dtype=torch.int8, device=device)
    scales = torch.empty((batch, -(-rows // TILE)), dtype=torch.bfloat16, device=device)
    return Guesses(codes, scales, features, low, high)
