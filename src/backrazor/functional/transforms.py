"""What a razored operator says to the ways of differentiating that it has no answer to.

Backward reads a pruned copy, so a gradient is a number without a derivative of its own. ``differentiable_once`` lets
such a gradient be computed under ``create_graph=True`` and refuses when it is differentiated, whatever it depends on.
``torch.autograd.function.once_differentiable`` refuses only where the incoming gradient requires one, and a gradient
penalty would contribute nothing without a word.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.fx import Proxy

from ..kernels.sealed import traced

_WAY_OUT = (
    "call backrazor.unrazor_(model) first; razor_(..., filter_fn=...) can then leave the layers that it concerns dense"
)
_TWICE = (
    "backrazor: the gradient of {} was computed from pruned activations and cannot be differentiated again "
    f"(create_graph=True, as for a gradient penalty): {_WAY_OUT}"
)
# Requires a gradient outside of every functorch transform, and so does what is computed with it.
_ANCHOR = torch.empty(0, requires_grad=True, device="cpu")


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


class _Calls(threading.local):
    """``own``: how many razored operators run in this thread. What they save is theirs to choose (see ``rest``)."""

    def __init__(self) -> None:
        self.own = 0


calls = _Calls()


NODES: dict[str, Callable[..., Any]] = {}  # the functions that ``one_node`` decorates, by name
Operator = TypeVar("Operator", bound=Callable[..., Any])


def one_node(function: Operator) -> Operator:
    """Decorator of an operator: where Dynamo traces a call of it, one node of the graph (see ``nodes``). Its arguments
    are tensors and plain values, and it returns a tensor or None."""
    name = f"{function.__module__}.{function.__qualname__}"
    NODES[name] = function

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            from .nodes import IN_GRAPH

            return IN_GRAPH[name](*args, **kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


class RazorFunction(torch.autograd.Function):
    """An autograd Function with ``setup_context``, as ``torch.func`` asks for. Called by ``run``.

    PyTorch binds the arguments of such a Function to its signature at every call, which takes longer than a small
    operator. Outside of ``torch.func`` the same two functions run as one ``forward(ctx, ...)``.
    """

    _direct: type[torch.autograd.Function]

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = cls.forward(*arguments)
            cls.setup_context(ctx, arguments, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(cls.backward), "__module__": __name__}
        cls._direct = type(cls.__name__, (torch.autograd.Function,), members)

    @classmethod
    def run(cls, *arguments: Any) -> Any:
        """``apply``."""
        if _functorch.peek_interpreter_stack() is not None:
            return cls.apply(*arguments)
        calls.own += 1
        try:
            return cls._direct.apply(*arguments)
        finally:
            calls.own -= 1


def differentiable_once(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Decorator of the ``backward`` of an autograd Function whose first output alone is differentiable.

    The function is called as ``backward(ctx, gradient of the first output)`` without recording. Where gradients are
    enabled, what it returns raises RuntimeError as soon as it is differentiated.
    """

    @wraps(backward)
    def once(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple:
        if grad is None:  # nothing downstream depends on the output
            return tuple(None for _ in ctx.needs_input_grad)
        if not traced():
            _refuse_vmap(grad)
        with torch.no_grad():
            gradients = backward(ctx, grad)
        if not torch.is_grad_enabled() or traced():
            return gradients
        message = _TWICE.format(type(ctx).__name__.strip("_").removesuffix("Backward").removesuffix("Generated"))
        if (
            _kinds().count(_functorch.TransformType.Grad) > 1
        ):  # of the gradient of a gradient, the outer transform would see a constant
            raise RuntimeError(message)
        return _Refused.apply(message, _ANCHOR, *gradients)

    return once


def _kinds() -> list[_functorch.TransformType]:
    """The transforms of ``torch.func`` that are active."""
    return [level.key() for level in _functorch.get_interpreter_stack() or ()]


def is_wrapped(x: Tensor) -> bool:
    """Whether x belongs to a transform of ``torch.func``."""
    return not traced() and _functorch.is_functorch_wrapped_tensor(x)


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is active."""
    return forward_ad._current_level >= 0 or _functorch.peek_interpreter_stack() is not None


def is_mapped() -> bool:
    """Whether ``torch.compile`` traces a function that the network itself vectorises, such as the step of a scan. What
    is inside is left as it is: no operator of this library can be vectorised."""
    return traced() and _functorch.TransformType.Vmap in _kinds()


def _refuse_vmap(*tensors: Tensor) -> None:
    # the second is what torch.autograd.grad(..., is_grads_batched=True) makes
    batched = any(map(_functorch.is_legacy_batchedtensor, tensors))
    if batched or _functorch.TransformType.Vmap in _kinds():
        raise RuntimeError(
            f"torch.func.vmap (per-sample gradients, jacobians) cannot go through a razored layer: {_WAY_OUT}"
        )


def refuse_tracing(x: Tensor | Proxy) -> None:
    """Raise where a razored operator is recorded for later.

    Raises:
        RuntimeError: inside ``torch.jit.trace``.
        TypeError: ``torch.fx`` traces.
    """
    if torch.jit.is_tracing():
        raise RuntimeError("torch.jit.trace cannot record a razored layer: call backrazor.unrazor_(model) first")
    if isinstance(x, Proxy):
        raise TypeError(
            "torch.fx cannot trace through a razored layer: trace the plain model and razor the result, or name the "
            "layer's class a leaf of the tracer"
        )


def refuse_transforms(*tensors: Tensor) -> None:
    """Raise where a razored operator that needs a gradient is vectorised or differentiated forward.

    Raises:
        RuntimeError: inside ``torch.func.vmap`` or forward-mode differentiation.
    """
    _refuse_vmap()
    forward = _functorch.TransformType.Jvp in _kinds()
    if not forward and forward_ad._current_level >= 0:
        forward = any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    if forward:
        raise RuntimeError(f"forward-mode differentiation (jvp) cannot go through a razored layer: {_WAY_OUT}")


def refuse_script(module: torch.nn.Module) -> None:
    """What ``torch.jit.script`` calls of a module before it compiles it.

    Raises:
        RuntimeError: always.
    """
    name = type(module).__name__
    raise RuntimeError(
        f"torch.jit.script cannot compile the razored layer {name}: call backrazor.unrazor_(model) first"
    )
