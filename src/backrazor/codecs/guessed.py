"""The pruned codec with a guess for what is dropped: x_hat = guess + the K largest of what differs from it.

The guess is one number per row of a sample: the mean of a channel, or of a feature over the tokens. Where the input
comes from a piecewise-linear activation, whose backward keeps one bit per element anyway, the guess may hold where that
bit is set alone, and zero elsewhere: what a ReLU has made zero costs nothing to know. Where it comes from a smooth one,
whose backward keeps a code per element, the guess is the row's number times the mean output of the code's interval.

Shape legend: B samples, C channels, I features, R rows of a sample (C or I), n elements per sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import guess_pack, guess_unpack
from .derivative import Bits, Levels
from .packed import Form, Packed
from .pruned import Pruned, PrunedForm
from .roles import MEANS, mark
from .smooth import outputs_on


@dataclass(frozen=True, slots=True)
class Guessed:
    """``pruned`` says what is kept of the differences. ``features``: the rows are the features of tokens (B, *, I), not
    the channels of a map (B, C, *). ``known``: the codec of what the activation before keeps of each element, or
    None."""

    pruned: Pruned
    features: bool
    known: Bits | Levels | None = None

    def form(self, x: Tensor) -> GuessedForm:
        """How x (B, ...) is going to be stored."""
        rows = x.shape[-1] if self.features else x.shape[1]
        means = Pruned(0.0, "int8").form(x.new_empty((), dtype=torch.float32).expand(x.shape[0], rows))
        return GuessedForm(self.pruned.form(x), means, self.features, self.known)

    def pack(self, x: Tensor, flag: Tensor, told: Tensor | None = None) -> Packed:
        """Pack x (B, ...). ``told`` (B, bytes) uint8: what the activation that x comes from keeps, by ``known``."""
        form = self.form(x)
        low, high = (self.known.low, self.known.high) if isinstance(self.known, Bits) else (math.nan, math.nan)
        kept, rows = form.pruned, form.means.shape[1]
        levels = form.levels(x.device)
        *parts, codes, scales = guess_pack(
            x.detach(),
            kept.keep,
            kept.values,
            kept.index,
            rows,
            self.features,
            low,
            high,
            None if levels is None else told,
            levels,
            flag,
        )
        stored = (*kept.marked(parts), mark(codes, MEANS), mark(scales, MEANS))
        return Packed(stored if told is None else (*stored, told), form)


@dataclass(frozen=True, slots=True)
class GuessedForm(Form):
    """The tensors of ``pruned``, of the means, and what the activation before keeps where it tells of the elements."""

    pruned: PrunedForm
    means: PrunedForm
    features: bool
    known: Bits | Levels | None

    @property
    def masked(self) -> bool:
        """Whether a mask says where the guess holds."""
        return isinstance(self.known, Bits)

    def levels(self, device: torch.device) -> Tensor | None:
        """What the codes of a smooth activation stand for, (2^bits,) float32."""
        return outputs_on(self.known.name, self.known.bits, device) if isinstance(self.known, Levels) else None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pruned.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.pruned.dtype

    @property
    def count(self) -> int:
        return self.pruned.count + self.means.count + (self.known is not None)

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
        told = None if self.known is None else tensors[-1][start:stop]
        levels, n, index = self.levels(codes.device), self.sample_numel, self.pruned.index
        return self.pruned.shaped(guess_unpack(*kept, codes, scales, told, levels, n, self.features, index, dtype))

    def own_values(self, tensors: tuple[Tensor, ...], x_hat: Tensor, start: int, stop: int) -> Tensor:
        return self.pruned.read(tensors[: self.pruned.count], start, stop, x_hat.dtype).count_nonzero()
