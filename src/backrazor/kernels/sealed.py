"""Whole steps of an operator as one node of a compiled graph.

A step that goes through a batch some samples at a time would be unrolled by a compiler, or make it hold the batch to
one size. While ``torch.compile`` traces, a ``sealed`` function becomes a call of one operator of ``torch.library``
instead, which runs the function when the graph runs. What is no tensor travels in the call as JSON text, so that a
graph from the compiler's cache on disk means the same in every process; sizes that the compiler keeps open travel as
numbers of their own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, wraps
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._guards import TracingContext

from .operators import library

Outputs = tuple[Tensor | None, ...]
Function = TypeVar("Function", bound=Callable[..., Any])

_SEALED: dict[str, tuple[Callable[..., Outputs], Callable[..., Outputs]]] = {}  # the function and its shapes, by name
_NAMED = (torch.dtype, torch.memory_format)
_NONE = torch.bool  # an empty tensor of this type, which no sealed function returns, stands for None


def traced() -> bool:
    """Whether ``torch.compile`` traces in this thread: tensors stand for others, and what is done now is recorded."""
    return TracingContext.try_get() is not None


def sealed(like: Callable[..., Outputs]) -> Callable[[Function], Function]:
    """Decorator of a function of tensors, codecs, forms and plain values (nested in tuples) that returns a tuple of
    tensors and None. It changes no argument.

    ``like`` has the same arguments and gives tensors of the same shapes and types, without computing them. In a
    compiled graph outputs are contiguous, whatever the function gives.
    """

    def seal(function: Function) -> Function:
        name = f"{function.__module__}.{function.__qualname__}".removeprefix("backrazor.")
        _SEALED[name] = function, like

        @wraps(function)
        def call(*arguments: Any) -> Outputs:
            if not traced():
                return function(*arguments)
            tensors: list[Tensor] = []
            sizes: list[Any] = []
            how = json.dumps(_plain(arguments, tensors, sizes))
            made = torch.ops.backrazor.sealed(name, how, tensors, sizes)
            return tuple(None if part.dtype == _NONE else part for part in made)

        return call  # type: ignore[return-value]

    return seal


def _plain(value: Any, tensors: list[Tensor], sizes: list[Any]) -> Any:
    """``value`` in JSON's types; tensors and open sizes are put into the lists.

    Raises:
        TypeError: a value that has no form there.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, torch.SymInt):
        sizes.append(value)
        return {"size": len(sizes) - 1}
    if isinstance(value, _NAMED):
        return {"named": str(value).removeprefix("torch.")}
    cls = type(value)
    own = f"{cls.__module__}:{cls.__qualname__}"
    if dataclasses.is_dataclass(value):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return {own: [_plain(part, tensors, sizes) for part in parts]}
    if isinstance(value, (tuple, list)):
        parts = [_plain(part, tensors, sizes) for part in value]
        return {own: parts} if hasattr(value, "_fields") else parts
    raise TypeError(f"{own} cannot be part of a sealed call")


def _rebuilt(value: Any, tensors: Sequence[Tensor], sizes: Sequence[Any]) -> Any:
    """What ``_plain`` made ``value`` of; lists are tuples."""
    if isinstance(value, list):
        return tuple(_rebuilt(part, tensors, sizes) for part in value)
    if not isinstance(value, dict):
        return value
    ((kind, what),) = value.items()
    if kind == "tensor":
        return tensors[what]
    if kind == "size":
        return sizes[what]
    if kind == "named":
        return getattr(torch, what)
    return _class(kind)(*(_rebuilt(part, tensors, sizes) for part in what))


@cache
def _class(name: str) -> type:
    module, _, qualified = name.partition(":")
    return getattr(import_module(module), qualified)


@lru_cache(4096)
def _read(how: str) -> Any:
    return json.loads(how)


def _run(name: str, how: str, tensors: list[Tensor], sizes: list[int]) -> list[Tensor]:
    function, _ = _SEALED[name]
    taken = {tensor.untyped_storage()._cdata for tensor in tensors}
    outputs = []
    for part in function(*_rebuilt(_read(how), tensors, sizes)):
        out = tensors[0].new_empty(0, dtype=_NONE) if part is None else part.contiguous()
        outputs.append(out.clone() if out.untyped_storage()._cdata in taken else out)
        taken.add(outputs[-1].untyped_storage()._cdata)
    return outputs


def _fake(name: str, how: str, tensors: list[Tensor], sizes: list[Any]) -> list[Tensor]:
    _, like = _SEALED[name]
    found = like(*_rebuilt(_read(how), tensors, sizes))
    return [tensors[0].new_empty(0, dtype=_NONE) if part is None else part.new_empty(part.shape) for part in found]


library.define(
    "sealed(str name, str how, Tensor[] tensors, SymInt[] sizes) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
)
library.impl("sealed", _disable_dynamo(_run), "CompositeExplicitAutograd")
torch.library.register_fake("backrazor::sealed", _fake, lib=library)
