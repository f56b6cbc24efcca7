"""How the input of an operator with a weight is stored: one rule, by what the input is and how the weight reads it.

    input                                               form
    of a norm that keeps codes                          read from those codes, no bytes (``shared``)
    of an attention that keeps codes of q, k and v      worked out from those codes, no bytes (``shared``)
    an activation's output, a map (B, C, *)             differences from the channel's mean, pruned
    tokens (B, *, I)                                    differences from the feature's mean over tokens, pruned
        either, whose activation keeps bits             ... and zero where the bit says so, but in depthwise
                                                        convolutions of more than three columns
        either, whose activation keeps codes            differences from a number per channel or feature times the
                                                        code's mean output, pruned
    a map that comes from no activation                 averages of blocks in 4 bits, an image's in 8
    fewer than four positions per channel               whole in 8 bits
    up to four features, such as coordinates            whole in 8 bits
    a vector per sample (B, I)                          pruned, zero where dropped

``fill="zero"``, the paper's rule, prunes every input and reads zero where it was dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .averaged import Averaged
from .derivative import Bits, DerivativeForm, Levels
from .guessed import Guessed
from .packed import Packed
from .pruned import Pruned, pack, whole_values

# Where a mean over fewer positions would cost as much as they do.
FEWEST_POSITIONS = 4
# With a mask a depthwise product is dense. The convolution library is fast at kernels of so many columns, and slow at
# wider ones.
FAST_COLUMNS = 3
# Bits of a smooth activation's codes that kernels read.
CODE_BITS = (2, 4)
# A map of so few channels is an image, tokens of so few features are coordinates: 4 bits of them, or a few of their
# elements, tell too little, and 8 bits of all take little.
IMAGE_CHANNELS = 4
# Averages per map side, for kernels of one position and larger ones, down to the sparsity at which positions and values
# of pruned inputs take as many bytes; beyond it, less.
SIDE, KERNEL_SIDE, FULL_SHARE = 15, 62, 0.03


class Use(NamedTuple):
    """How a weight reads its input. ``features``: rows of features (B, *, I), not channels. ``kernel``: several
    positions at a time. ``masked``: a product with a mask costs little."""

    features: bool
    kernel: bool
    masked: bool

    @classmethod
    def of(cls, weight: Tensor) -> Use:
        """By the shape of a Linear's weight (O, I) or a convolution's (D, C / groups, *)."""
        if weight.dim() < 3:
            return cls(True, False, False)
        _, inputs, *kernel = weight.shape
        return cls(False, math.prod(kernel) > 1, inputs > 1 or kernel[-1] <= FAST_COLUMNS)


FEATURES = Use(True, False, False)  # a gate per feature
CHANNELS = Use(False, False, True)  # a gate per channel


@dataclass(frozen=True, slots=True)
class Activation:
    """What is known of an activation's output beside that it is one: the codes that its backward keeps, if they tell
    of the output's elements."""

    codes: Packed | None

    def of(self, x: Tensor) -> Bits | Levels | None:
        """The codec of the codes, one per element of x (B, ...) as it lies, if there are such."""
        form = None if self.codes is None else self.codes.form
        if not isinstance(form, DerivativeForm) or form.format != torch.contiguous_format or not x.is_contiguous():
            return None
        known = isinstance(form.codec, Bits) or (isinstance(form.codec, Levels) and form.codec.bits in CODE_BITS)
        same = x.shape[0] == form.shape[0] and x.numel() == math.prod(form.shape)
        return form.codec if known and same else None


def pack_input(x: Tensor, codec: Pruned, use: Use, activation: Activation | None, flag: Tensor) -> Packed:
    """Pack x (B, ...) for the gradient of a weight that reads it as ``use`` says. ``activation``: what is known of the
    activation that x comes from; None where it comes from none."""
    if not codec.guesses:
        return pack(x, codec, flag)
    whole = replace(codec, sparsity=0.0, values=whole_values(codec.values))
    if use.features and x.shape[-1] <= IMAGE_CHANNELS:
        return pack(x, whole, flag)
    if x.dim() < 3:
        return pack(x, codec, flag)
    positions = math.prod(x.shape[1:-1] if use.features else x.shape[2:])
    if positions < FEWEST_POSITIONS or not x.numel():
        return pack(x, codec if use.features else whole, flag)
    known = activation.of(x) if activation is not None and codec.fill == "known" else None
    told = None if known is None else activation.codes.tensors[0]
    if use.features:
        return Guessed(codec, True, known).pack(x, flag, told)
    if activation is None and x.dim() in (4, 5):  # of a video by frame
        share = (1 - codec.sparsity) / FULL_SHARE
        side = KERNEL_SIDE * math.sqrt(share) if use.kernel else SIDE * share
        values = "int8" if x.shape[1] <= IMAGE_CHANNELS else "int4"
        return Averaged(max(round(side), 1), values).pack(x.flatten(1, -3), flag)
    if known is None or not (use.masked or isinstance(known, Levels)):
        return Guessed(codec, False).pack(x, flag)
    return Guessed(codec, False, known).pack(x, flag, told)
