"""A function of a batch, some samples at a time, so that what it makes on its way never exists for the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..codecs.shared import activation_of, remember_activation_of_part, remember_activations_of_parts
from .transforms import RazorFunction

Bounds = Sequence[tuple[int, int]]


def in_chunks(function: Callable[[Tensor], Tensor], x: Tensor, bounds: Bounds) -> Tensor:
    """``function`` of contiguous x (B, ...), called on samples start to stop for each of ``bounds``, which cover x in
    order. It treats every sample by itself and does not modify its input.

    What is known of x as an activation's output holds of its parts, and of the result what holds of the parts of it.
    Backward goes through one part after the other, too: the last comes first, and is done before the next begins.
    """
    gathered = _Gathered(x.shape)
    parts = _Split.run(x, bounds) if x.requires_grad else tuple(x[start:stop] for start, stop in bounds)
    out, known = None, []
    for (start, stop), part in zip(bounds, parts, strict=True):
        if part.requires_grad:
            part = _Into.run(part, gathered, start)
        remember_activation_of_part(x, part, start, stop)
        made = function(part)
        known.append(activation_of(made))
        if out is None:
            out = made.new_empty(x.shape[0], *made.shape[1:])
        out = _Placed.run(out, made, start)
        del made
    remember_activations_of_parts(out, bounds, known)
    return out


class _Gathered:
    """Where the gradients of the parts of x meet in one backward, so that they need not be put together at its end."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.whole: Tensor | None = None


class _Split(RazorFunction):
    """The parts of x, as views."""

    @staticmethod
    def forward(x: Tensor, bounds: Bounds) -> tuple[Tensor, ...]:
        return tuple(x[start:stop] for start, stop in bounds)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        whole = gradients[0]._base
        if whole is not None and not torch.is_grad_enabled() and all(g._base is whole for g in gradients):
            return whole, None  # where ``_Into`` has gathered them
        return torch.cat(gradients), None


class _Into(RazorFunction):
    """The same tensor; its gradient goes to its place in the whole."""

    @staticmethod
    def forward(part: Tensor, gathered: _Gathered, start: int) -> Tensor:
        return part.view_as(part)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        _, ctx.gathered, ctx.start = inputs

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return grad, None, None
        gathered, stop = ctx.gathered, ctx.start + len(grad)
        if gathered.whole is None:
            gathered.whole = grad.new_empty(gathered.shape)
        part = gathered.whole[ctx.start : stop]
        part.copy_(grad)
        if ctx.start == 0:  # the last of this backward; another one has a tensor of its own
            gathered.whole = None
        return part, None, None


class _Placed(RazorFunction):
    """``out``, with ``part`` written at ``start``."""

    @staticmethod
    def forward(out: Tensor, part: Tensor, start: int) -> Tensor:
        out[start : start + len(part)] = part
        return out

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        out, part, start = inputs
        ctx.mark_dirty(out)
        ctx.bounds = start, start + part.shape[0]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        start, stop = ctx.bounds
        return grad, grad[start:stop], None
