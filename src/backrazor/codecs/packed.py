"""What every codec gives: a packed activation, which knows how it is stored and reads itself back.

    codec    what is chosen: a rule with its settings, such as ``Pruned(0.9, "int8")``
    form     how one activation is stored under it: static, known from the activation's shape
    Packed   the form and the stored tensors
    role     what a stored tensor is, for the ledger (see ``roles``)

An operator packs what it needs, hands the tensors through its autograd Function and keeps them with ``save``;
``load`` gives the same parts back in backward.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Form(ABC):
    """How an activation is stored. Subclasses are frozen dataclasses with ``shape``, that of the activation (B, ...),
    and ``dtype``, that of its elements where that is what reading gives by default."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def sample_numel(self) -> int:
        """Elements of one sample."""
        return math.prod(self.shape[1:])

    @property
    @abstractmethod
    def count(self) -> int:
        """How many tensors are stored, each (B, ...)."""

    @abstractmethod
    def read(self, tensors: tuple[Tensor, ...], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Samples start to stop of what stands for the activation: dense (stop - start, ...) of ``dtype``."""

    def own_values(self, tensors: tuple[Tensor, ...], x_hat: Tensor, start: int, stop: int) -> Tensor:
        """How many elements of samples start to stop, which ``x_hat`` holds, have a value of their own: neither zero
        nor shared. No dimensions."""
        return x_hat.count_nonzero()


class Packed(NamedTuple):
    """The stored tensors and how they are read."""

    tensors: tuple[Tensor, ...]
    form: Form

    @property
    def arguments(self) -> tuple[Any, ...]:
        """For ``Function.apply``, which has to see tensors one by one; ``packed_of`` is the way back."""
        return self.form, *self.tensors

    def unpack(self, start: int = 0, stop: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """x_hat: samples start to stop, dense (stop - start, ...) of ``dtype`` (default: the activation's)."""
        stop = self.form.shape[0] if stop is None else stop
        return self.form.read(self.tensors, start, stop, dtype or self.form.dtype)


NOTHING = (None,)  # the ``arguments`` of what is not packed


def packed_of(form: Form | None, tensors: Sequence[Tensor]) -> Packed | None:
    """What ``Packed.arguments`` were made of; None of ``NOTHING``."""
    return None if form is None else Packed(tuple(tensors), form)


def all_packed_of(arguments: Sequence[Any]) -> list[Packed | None]:
    """What several ``Packed.arguments``, one behind another, were made of."""
    parts, at = [], 0
    while at < len(arguments):
        form = arguments[at]
        stop = at + 1 + (0 if form is None else form.count)
        parts.append(packed_of(form, arguments[at + 1 : stop]))
        at = stop
    return parts


Part = Tensor | Packed | None


def save(ctx: Any, *parts: Part) -> None:
    """Keep ``parts`` for backward, in one ``save_for_backward``: hooks see the tensors, and autograd frees them."""
    tensors: list[Tensor | None] = []
    ctx.forms = [part.form if isinstance(part, Packed) else None for part in parts]
    for part in parts:
        tensors += part.tensors if isinstance(part, Packed) else (part,)
    ctx.save_for_backward(*tensors)


def load(ctx: Any) -> list[Any]:
    """The parts that ``save`` kept, in their order."""
    tensors, parts, at = ctx.saved_tensors, [], 0
    for form in ctx.forms:
        count = 1 if form is None else form.count
        parts.append(tensors[at] if form is None else Packed(tensors[at : at + count], form))
        at += count
    return parts


def save_outputs(ctx: Any, outputs: Sequence[Tensor], *parts: Part) -> None:
    """``save`` where the Function packs inside its forward: ``outputs``, all that it returns but the first, are what
    it has packed. They have no derivative."""
    ctx.mark_non_differentiable(*outputs)
    ctx.set_materialize_grads(False)
    save(ctx, *parts)
