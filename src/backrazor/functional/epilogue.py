"""An activation as the end of a larger operator: computed on a chunk of samples, what its gradient needs kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..codecs import Bits, Levels, Packed, mark
from ..codecs.derivative import DerivativeForm
from ..codecs.smooth import ACTIVATIONS
from ..kernels import mask_clamp_
from ..kernels.derivative.layout import code_bytes
from ..kernels.dispatch import on_cuda
from .transforms import is_wrapped

Epilogue = Bits | Levels

# Elements that PyTorch puts into vectors together on the CPU. What is left over it works out one by one, where
# exponentials and the like are rounded otherwise.
LANES = 32


def rounds_by_place(act: Epilogue, sample_numel: int) -> bool:
    """Whether the activation of some samples of this many elements may be rounded otherwise than that of all."""
    return isinstance(act, Levels) and act.name != "hardswish" and sample_numel % LANES != 0


def activate_(y: Tensor, act: Epilogue) -> None:
    """The activation of y in its place, by PyTorch's own operators."""
    if isinstance(act, Levels):
        y.copy_(ACTIVATIONS[act.name].forward(y))
    elif math.isnan(act.high):
        torch.relu_(y)
    else:
        torch.ops.aten.hardtanh_(y, act.low, act.high)


def encode(y: Tensor, act: Epilogue) -> Tensor:
    """What the gradient at contiguous y (b, ...) needs: uint8 (b, bytes)."""
    return act.encode(y.reshape(y.shape[0], math.prod(y.shape[1:])))


def encode_and_activate_(y: Tensor, act: Epilogue) -> Tensor:
    """Both: ``encode(y, act)``, and the activation of contiguous y in its place."""
    if isinstance(act, Bits) and on_cuda(y.device) and not is_wrapped(y):
        return mask_clamp_(y.view(y.shape[0], math.prod(y.shape[1:])), act.low, act.high)
    codes = encode(y, act)
    activate_(y, act)
    return codes


def code_shape(shape: torch.Size, act: Epilogue) -> tuple[int, int]:
    """The shape of ``encode(y, act)`` for y of this shape."""
    return shape[0], code_bytes(math.prod(shape[1:]), act.bits if isinstance(act, Levels) else 1)


def joined(codes: list[Tensor], act: Epilogue) -> Tensor:
    """The codes of all chunks as one tensor, labelled."""
    return mark(torch.cat(codes) if len(codes) > 1 else codes[0], act.role)


def packed_epilogue(codes: Tensor, shape: torch.Size, act: Epilogue) -> Packed:
    """The codes of an output of this shape as what multiplies its gradient."""
    return Packed((codes,), DerivativeForm(tuple(shape), act))
