"""An activation as the end of a larger operator: computed on a chunk, its derivative's code kept."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..codecs import mark
from ..codecs.roles import MASK, QUANTISED
from ..kernels import level_apply, level_encode, mask_apply, mask_encode
from .activation import ACTIVATIONS, quantiser_on


class Act(NamedTuple):
    """An activation: piecewise linear with derivative 1 in (low, high) where ``name`` is "clamp" (``high`` NaN:
    unbounded), else one of ``ACTIVATIONS`` whose derivative is kept in ``bits``."""

    name: str
    low: float = 0.0
    high: float = 0.0
    bits: int = 0


def activate_(y: Tensor, act: Act) -> None:
    """The activation of y in its place, by PyTorch's own operators."""
    if act.name != "clamp":
        y.copy_(ACTIVATIONS[act.name].forward(y))
    elif math.isnan(act.high):
        torch.relu_(y)
    else:
        torch.ops.aten.hardtanh_(y, act.low, act.high)


def encode(y: Tensor, act: Act) -> Tensor:
    """What the gradient at y (b, ...) needs: uint8 (b, bytes)."""
    rows = y.reshape(y.shape[0], math.prod(y.shape[1:]))
    if act.name == "clamp":
        return mask_encode(rows, act.low, act.high)
    thresholds, _ = quantiser_on(act.name, act.bits, y.device)
    return level_encode(rows, thresholds, act.bits)


def join(codes: list[Tensor], act: Act) -> Tensor:
    """The codes of all chunks as one labelled tensor."""
    return mark(torch.cat(codes) if len(codes) > 1 else codes[0], MASK if act.name == "clamp" else QUANTISED)


def gradient(grad: Tensor, codes: Tensor, act: Act) -> Tensor:
    """A new tensor: the gradient before the activation, for samples whose ``codes`` are given."""
    rows = grad.reshape(grad.shape[0], math.prod(grad.shape[1:]))
    if act.name == "clamp":
        return mask_apply(rows, codes).view(grad.shape)
    _, levels = quantiser_on(act.name, act.bits, grad.device)
    return level_apply(rows, codes, levels, act.bits).view(grad.shape)
