"""Gradients that are gone before the next one is whole: every parameter steps during backward.

An ordinary step holds the gradients of all parameters at once, as many bytes as the weights that train. Here a hook of
autograd runs when a parameter's gradient is whole, the optimizer steps that parameter alone, and the gradient is freed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class GradientRelease:
    """From now on ``backward`` steps each parameter of ``optimizer`` and frees its gradient.

    The weights after a step are those of the ordinary step, to the bit, for every optimizer that updates a parameter
    from nothing but that parameter's own gradient and state. Its state, its groups and its ``state_dict`` stay as they
    are, so that a checkpoint of one way goes on the other way. ``optimizer.step`` has nothing left to do.

    What needs all gradients before the first weight changes cannot be had: clipping by their common norm, several
    backwards per step, the scale of float16's loss, leaving a step out because of its gradients.

    Args:
        optimizer: its groups may change their learning rate between steps, as a schedule does.
        before: called with each parameter when its gradient is whole and before it steps: to clip it by its own norm,
            or to look at it. It may set ``.grad`` to None, which leaves the parameter as it is.

    Raises:
        TypeError: the optimizer's step wants a closure, or (in backward) it keeps a state for a whole group.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, before: Callable[[Tensor], None] | None = None) -> None:
        if _wants_closure(optimizer):
            raise TypeError(
                f"{type(optimizer).__name__} steps all parameters at once: its gradients cannot be released"
            )
        self.optimizer, self.before = optimizer, before
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._step_of(number))
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
            if parameter.requires_grad
        ]

    def remove(self) -> None:
        """Back to the ordinary step."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _step_of(self, number: int) -> Callable[[Tensor], None]:
        def step(parameter: Tensor) -> None:
            if self.before is not None:
                self.before(parameter)
            if parameter.grad is not None:
                self._step(parameter, number)
                parameter.grad = None

        return step

    def _step(self, parameter: Tensor, number: int) -> None:
        """One step of an optimizer that has this parameter alone."""
        optimizer = self.optimizer
        groups = optimizer.param_groups
        alone = {**groups[number], "params": [parameter]}
        before = dict(alone)
        optimizer.param_groups = [alone]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups
        changed = [key for key, value in alone.items() if key not in before or _differs(before[key], value)]
        if changed:
            raise TypeError(
                f"{type(optimizer).__name__} keeps {changed[0]!r} for a whole group: its gradients cannot be released"
            )


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state, one storage counted once; 0 before its first step."""
    found: dict[int, int] = {}
    for state in optimizer.state.values():
        for value in state.values():
            for tensor in _plain(value):
                storage = tensor.untyped_storage()
                found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def _plain(value: Any) -> list[Tensor]:
    """The tensors that ``value`` is stored in: a tensor subclass may be made of several."""
    if not isinstance(value, Tensor):
        return []
    parts = getattr(value, "tensor_attrs", None)
    return [value] if parts is None else [tensor for name in parts for tensor in _plain(getattr(value, name))]


def _wants_closure(optimizer: torch.optim.Optimizer) -> bool:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _differs(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor) or isinstance(after, Tensor):
        return before is not after
    return bool(before != after)
