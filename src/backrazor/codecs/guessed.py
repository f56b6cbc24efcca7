"""The pruned codec with a guess for what is dropped: x_hat = guess + the K largest of what differs from it.

The guess is one number per row of a sample: the mean of a channel, or of a feature over the tokens. Where the input
comes from a piecewise-linear activation, whose backward keeps one bit per element anyway, the guess may hold where that
bit is set alone, and zero elsewhere: what a ReLU has made zero costs nothing to know.

Shape legend: B samples, C channels, I features, R rows of a sample (C or I), n elements per sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import guess_pack, guess_unpack
from .derivative import Bits
from .packed import Form, Packed
from .pruned import Pruned, PrunedForm
from .roles import MEANS, mark


@dataclass(frozen=True, slots=True)
class Guessed:
    """``pruned`` says what is kept of the differences. ``features``: the rows are the features of tokens (B, *, I), not
    the channels of a map (B, C, *). ``bits``: the codec of the mask that says where the guess holds, or None."""

    pruned: Pruned
    features: bool
    bits: Bits | None = None

    def form(self, x: Tensor) -> GuessedForm:
        """How x (B, ...) is going to be stored."""
        rows = x.shape[-1] if self.features else x.shape[1]
        means = Pruned(0.0, "int8").form(x.new_empty((), dtype=torch.float32).expand(x.shape[0], rows))
        return GuessedForm(self.pruned.form(x), means, self.features, self.bits is not None)

    def pack(self, x: Tensor, flag: Tensor, mask: Tensor | None = None) -> Packed:
        """Pack x (B, ...). ``mask`` (B, ceil(n / 8)) uint8: the bits of the activation that x comes from."""
        form = self.form(x)
        low, high = (self.bits.low, self.bits.high) if self.bits is not None else (math.nan, math.nan)
        kept, rows = form.pruned, form.means.shape[1]
        *parts, codes, scales = guess_pack(
            x.detach(), kept.keep, kept.values, kept.index, rows, self.features, low, high, flag
        )
        stored = (*kept.marked(parts), mark(codes, MEANS), mark(scales, MEANS))
        return Packed(stored if mask is None else (*stored, mask), form)


@dataclass(frozen=True, slots=True)
class GuessedForm(Form):
    """The tensors of ``pruned``, of the means, and the mask where there is one."""

    pruned: PrunedForm
    means: PrunedForm
    features: bool
    masked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pruned.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.pruned.dtype

    @property
    def count(self) -> int:
        return self.pruned.count + self.means.count + self.masked

    def guess(self, tensors: tuple[Tensor, ...], start: int, stop: int) -> Tensor:
        """(stop - start, R) float32."""
        at = self.pruned.count
        return self.means.read(tensors[at : at + self.means.count], start, stop, torch.float32)

    def masked_guess(self, tensors: tuple[Tensor, ...], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The mask (stop - start, ceil(n / 8)) and the guess that holds where its bits are set."""
        return tensors[-1][start:stop], self.guess(tensors, start, stop)

    def read(self, tensors: tuple[Tensor, ...], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        kept = self.pruned.stored(tensors[: self.pruned.count], start, stop)
        codes, scales = (tensor[start:stop] for tensor in tensors[self.pruned.count :][:2])
        mask = tensors[-1][start:stop] if self.masked else None
        n, index = self.sample_numel, self.pruned.index
        return self.pruned.shaped(guess_unpack(*kept, codes, scales, mask, n, self.features, index, dtype))

    def own_values(self, tensors: tuple[Tensor, ...], x_hat: Tensor, start: int, stop: int) -> Tensor:
        return self.pruned.read(tensors[: self.pruned.count], start, stop, x_hat.dtype).count_nonzero()
