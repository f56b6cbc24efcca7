"""The pruned codec with a guess for what is dropped: x_hat = guess + the K largest of what differs from it.

The guess is one number per row of a sample: the mean of a channel, or of a feature over the tokens. Where the input
comes from a piecewise-linear activation, whose backward keeps one bit per element anyway, the guess may hold where that
bit is set alone, and zero elsewhere: what a ReLU has made zero costs nothing to know. Where it comes from a smooth one,
whose backward keeps a code per element, the guess is the row's number times the mean output of the code's interval.

A token of zeros, as padding is, stays one: one bit per token says so. Its gradient may be of any size, as behind a
division by its norm, and a guess would let it into the weight's gradient.

Shape legend: B samples, C channels, I features, R rows of a sample (C or I), n elements per sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..kernels import guess_pack, guess_unpack, mask_apply, mask_encode
from ..kernels.dispatch import on_cuda
from ..kernels.sealed import traced
from .derivative import Bits, Levels
from .packed import Form, Packed
from .pruned import Pruned, PrunedForm
from .roles import MASK, MEANS, mark
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
        if form.tells_tokens:
            stored = (*stored, mark(mask_encode(_present(x.detach().flatten(1, -2)), 0.0, math.nan), MASK))
        return Packed(stored if told is None else (*stored, told), form)


def _is_readable(x: Tensor) -> bool:
    """Whether a number of x can be looked at without waiting for a device, and there is one."""
    on_cpu = x.device.type == "cpu" and not on_cuda(x.device)
    return on_cpu and not traced() and not isinstance(x, FakeTensor)


def _present(tokens: Tensor) -> Tensor:
    """(B, T) of 1, and 0 where all of a token (B, T, I) is zero."""
    if _is_readable(tokens) and tokens[..., 0].ne(0).all():
        return tokens.new_ones(tokens.shape[:2])
    low, high = tokens.aminmax(dim=-1)
    return (low.ne(0) | high.ne(0)).to(tokens.dtype)


@dataclass(frozen=True, slots=True)
class GuessedForm(Form):
    """The tensors of ``pruned``, of the means, and what the activation before keeps where it tells of the elements; of
    tokens of which nothing is told, one bit each."""

    pruned: PrunedForm
    means: PrunedForm
    features: bool
    known: Bits | Levels | None

    @property
    def masked(self) -> bool:
        """Whether a mask says where the guess holds."""
        return isinstance(self.known, Bits)

    @property
    def tells_tokens(self) -> bool:
        """Whether a bit per token says that it is not all zero."""
        return self.features and self.known is None

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
        return self.pruned.count + self.means.count + (self.tells_tokens or self.known is not None)

    def guess(self, tensors: tuple[Tensor, ...], start: int, stop: int) -> Tensor:
        """(stop - start, R) float32."""
        at = self.pruned.count
        return self.means.read(tensors[at : at + self.means.count], start, stop, torch.float32)

    def present(self, tensors: tuple[Tensor, ...], start: int, stop: int, dtype: torch.dtype) -> Tensor | None:
        """(stop - start, T, 1) of 1, and 0 for tokens of zeros; None where it is known that there are none."""
        if not self.tells_tokens:
            return None
        bits = tensors[-1][start:stop]
        count = math.prod(self.shape[1:-1])
        found = mask_apply(torch.ones(stop - start, count, dtype=dtype, device=bits.device), bits)
        return None if _is_readable(bits) and found.all() else found.unsqueeze(2)

    def masked_guess(self, tensors: tuple[Tensor, ...], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The mask (stop - start, ceil(n / 8)) and the guess that holds where its bits are set."""
        return tensors[-1][start:stop], self.guess(tensors, start, stop)

    def read(self, tensors: tuple[Tensor, ...], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        kept = self.pruned.stored(tensors[: self.pruned.count], start, stop)
        codes, scales = (tensor[start:stop] for tensor in tensors[self.pruned.count :][:2])
        told = None if self.known is None else tensors[-1][start:stop]
        levels, n, index = self.levels(codes.device), self.sample_numel, self.pruned.index
        x_hat = guess_unpack(*kept, codes, scales, told, levels, n, self.features, index, dtype)
        present = self.present(tensors, start, stop, dtype)
        if present is not None:
            x_hat.view(stop - start, present.shape[1], -1).mul_(present)
        return self.pruned.shaped(x_hat)

    def own_values(self, tensors: tuple[Tensor, ...], x_hat: Tensor, start: int, stop: int) -> Tensor:
        return self.pruned.read(tensors[: self.pruned.count], start, stop, x_hat.dtype).count_nonzero()
