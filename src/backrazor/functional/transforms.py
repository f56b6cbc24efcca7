"""What a razored operator says to the ways of differentiating that it has no answer to.

Backward reads a pruned copy, so a gradient is a number without a derivative of its own. ``differentiable_once`` lets
such a gradient be computed under ``create_graph=True`` and refuses when it is differentiated, whatever it depends on.
``torch.autograd.function.once_differentiable`` refuses only where the incoming gradient requires one, and a gradient
penalty would contribute nothing without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

_WAY_OUT = (
    "call backrazor.unrazor_(model) first, or leave the layers that it concerns dense with razor_(..., filter_fn=...)"
)
_TWICE = (
    "backrazor: the gradient of {} was computed from pruned activations and cannot be differentiated again "
    f"(create_graph=True, as for a gradient penalty): {_WAY_OUT}"
)
# Requires a gradient outside of every functorch transform, and so does what is computed with it.
_ANCHOR = torch.empty(0, requires_grad=True)


class _Refused(torch.autograd.Function):
    """The identity on ``gradients``; raises when it is differentiated."""

    @staticmethod
    def forward(message: str, anchor: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else g.detach() for g in gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple:
        raise RuntimeError(ctx.message)


def differentiable_once(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Decorator of the ``backward`` of an autograd Function whose first output alone is differentiable.

    The function is called as ``backward(ctx, gradient of the first output)`` without recording. Where gradients are
    enabled, what it returns raises RuntimeError as soon as it is differentiated.
    """

    @wraps(backward)
    def once(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple:
        if grad is None:  # nothing downstream depends on the output
            return tuple(None for _ in ctx.needs_input_grad)
        with torch.no_grad():
            gradients = backward(ctx, grad)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return gradients
        message = _TWICE.format(type(ctx).__name__.strip("_").removesuffix("Backward"))
        if _grad_transforms() > 1:  # of the gradient of a gradient, the outer transform would see a constant
            raise RuntimeError(message)
        return _Refused.apply(message, _ANCHOR, *gradients)

    return once


def _grad_transforms() -> int:
    kinds = [level.key() for level in _functorch.get_interpreter_stack() or ()]
    return kinds.count(_functorch.TransformType.Grad)


def refuse_transforms(needed: bool, *tensors: Tensor | None) -> None:
    """Raise where a razored operator is traced, or vectorised or differentiated forward while gradients are ``needed``.

    Raises:
        RuntimeError: inside ``torch.jit.trace``, ``torch.func.vmap`` or forward-mode differentiation.
    """
    if torch.jit.is_tracing():
        raise RuntimeError("torch.jit.trace cannot record a razored layer: call backrazor.unrazor_(model) first")
    if not needed:
        return
    kinds = [level.key() for level in _functorch.get_interpreter_stack() or ()]
    if _functorch.TransformType.Vmap in kinds:
        raise RuntimeError(
            f"torch.func.vmap (per-sample gradients, jacobians) cannot go through a razored layer: {_WAY_OUT}"
        )
    forward = _functorch.TransformType.Jvp in kinds
    if not forward and forward_ad._current_level >= 0:
        forward = any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    if forward:
        raise RuntimeError(f"forward-mode differentiation (jvp) cannot go through a razored layer: {_WAY_OUT}")


def refuse_script(module: torch.nn.Module) -> None:
    """What ``torch.jit.script`` calls of a module before it compiles it.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        f"torch.jit.script cannot compile the razored layer {type(module).__name__}: call backrazor.unrazor_(model) first"
    )
