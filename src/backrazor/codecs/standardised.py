"""A weight that is standardised anew in every forward, as in normaliser-free networks: worked out again in backward, so
that nothing is kept beside the parameter (Qiao et al., https://arxiv.org/abs/1903.10520)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .packed import Form, Packed


@dataclass(frozen=True, slots=True)
class StandardisedForm(Form):
    """``F.batch_norm`` on the statistics of the parameter itself. Stored are the parameter (1, O, M) and, where there
    is one, the scale (O,)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    eps: float
    has_scale: bool

    @property
    def count(self) -> int:
        return 1 + self.has_scale

    def read(self, tensors: tuple[Tensor, ...], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        parameter, *scale = tensors
        out = F.batch_norm(parameter, None, None, scale[0] if scale else None, None, True, 0.0, self.eps)
        return out[start:stop].to(dtype)


def standardised(parameter: Tensor, scale: Tensor | None, eps: float) -> Packed:
    """What stands for a standardised weight."""
    form = StandardisedForm(tuple(parameter.shape), parameter.dtype, eps, scale is not None)
    tensors = (parameter,) if scale is None else (parameter, scale)
    return Packed(tuple(tensor.detach() for tensor in tensors), form)
