"""Functions that a module under the net calls by itself, met by the razored operators whatever the module's class.

A torch-function mode sees every call. Functions that have an operator here (``function_operators.py``) go to it, by the
rules of the module under the net. ``_DELICATE`` and ``_DIVIDES`` name those whose saved tensors do not bear 8 bits.
Everything else runs as it is, and what it saves falls into the net.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..functional.rest import dividing, running
from ..functional.transforms import is_mapped
from .function_layers import run_exactly
from .function_operators import RAZORED


class _Depth(threading.local):
    def __init__(self) -> None:
        self.on = 0


class Functions(TorchFunctionMode):
    """Hands functions to the operators that take their place, by the rules of the module under the net that runs."""

    def __init__(self) -> None:
        super().__init__()
        self._depth = _Depth()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The mode, once per thread."""
        if self._depth.on:
            yield
            return
        self._depth.on += 1
        try:
            with self:
                yield
        finally:
            self._depth.on -= 1

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """The mode again, inside of what ``paused`` calls."""
        stack = (torch._C._get_function_stack_at(at) for at in range(torch._C._len_torch_function_stack()))
        if not self._depth.on or any(mode is self for mode in stack):
            yield
            return
        with self:
            yield

    def paused(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``call(*args, **kwargs)`` without the mode, which would be asked for every attribute of every tensor. Where
        another mode stands above, it stays."""
        count = torch._C._len_torch_function_stack() if self._depth.on else 0
        if not count or torch._C._get_function_stack_at(count - 1) is not self:
            return call(*args, **kwargs)
        torch._C._pop_torch_function_stack()
        try:
            return call(*args, **kwargs)
        finally:
            torch._C._push_on_torch_function_stack(self)

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)
        handler = _HANDLERS.get(function) or _foreign(function)
        if handler is None or not torch.is_grad_enabled() or is_mapped():
            return function(*args, **kwargs)
        net = running()
        if net is None or net.settings.net.rules is None:
            return function(*args, **kwargs)
        # a module may hand a part's parameters to a function by itself: what is said of that part holds
        place = net.settings_for(*args[1:], *kwargs.values(), *args[:1]) if function in RAZORED else net.settings
        if place.net.rules is None:
            return function(*args, **kwargs) if place.net.packs else run_exactly(place, function, *args, **kwargs)
        return handler(place, function, *args, **kwargs)


FUNCTIONS = Functions()
_ANY = sys.maxsize


def _foreign(function: Any) -> Callable | None:
    """Operators of other libraries take coordinates and statistics, which do not bear 8 bits."""
    if isinstance(function, (torch._ops.OpOverloadPacket, torch._ops.OpOverload)):
        name = str(function._qualified_op_name if hasattr(function, "_qualified_op_name") else function)
        return None if name.startswith("aten") else run_exactly
    return None


def _dividing(place: Any, function: Callable, *args: Any, **kwargs: Any) -> Any:
    with dividing(_ANY):
        return function(*args, **kwargs)


def _norm(place: Any, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Divides by the norm, which is smaller than what it is of."""
    first = args[0] if args else next(iter(kwargs.values()))
    with dividing(first.numel() // 2 if isinstance(first, Tensor) else _ANY):
        return function(*args, **kwargs)


def _pow(place: Any, function: Callable, input: Any, exponent: Any, **kwargs: Any) -> Any:
    whole = isinstance(exponent, (int, float)) and exponent >= 1
    if whole:  # its gradient multiplies by a power of the input
        return function(input, exponent, **kwargs)
    return _dividing(place, function, input, exponent, **kwargs)


def _named(owner: Any, *names: str) -> list[Any]:
    """The members of ``owner`` that this version of PyTorch has."""
    return [getattr(owner, name) for name in names if hasattr(owner, name)]


_DIVIDES = ("div", "true_divide", "divide", "log", "log2", "log10", "sqrt", "rsqrt", "reciprocal", "std")
_DELICATE = (
    "log_softmax",
    "logsumexp",
    "logaddexp",
    "log1p",
    "acos",
    "arccos",
    "asin",
    "arcsin",
    "acosh",
    "atanh",
    "erfinv",
    "xlogy",
    "logit",
    "max",  # whose backward asks which elements equal the largest: after rounding perhaps none, and it divides by them
    "min",
    "aminmax",
    "fmod",
    "remainder",
    "renorm",
    "dist",
    "pdist",
    "prod",
    "cumprod",
    "cdist",
    "lstm",
    "gru",
    "rnn_tanh",
    "rnn_relu",
    "lstm_cell",
    "gru_cell",
    "instance_norm",
    "stft",
    "istft",
)


def _handlers() -> dict[Any, Callable]:
    table: dict[Any, Callable] = {}
    for name in dir(F):
        if name.endswith("_loss") or name in ("cross_entropy", "kl_div") or name.startswith("binary_cross_entropy"):
            table[getattr(F, name)] = run_exactly
    exact = [
        *_named(torch, *_DELICATE),
        *_named(Tensor, *_DELICATE),
        *_named(torch._VF, *_DELICATE),
        *_named(F, *_DELICATE, "grid_sample", "affine_grid"),
        *(getattr(torch.linalg, name) for name in dir(torch.linalg) if not name.startswith("_")),
    ]
    table.update((function, run_exactly) for function in exact if callable(function))
    divides = [
        *_named(torch, *_DIVIDES, "_weight_norm"),
        *_named(Tensor, *_DIVIDES, *(f"{name}_" for name in _DIVIDES)),
        *_named(Tensor, "__truediv__", "__rtruediv__", "__itruediv__", "__div__"),
        *_named(F, "pairwise_distance", "local_response_norm"),
    ]
    table.update((function, _dividing) for function in divides)
    norms = [
        *_named(torch, "norm", "cosine_similarity"),
        *_named(Tensor, "norm"),
        *_named(torch.linalg, "norm", "vector_norm"),
        *_named(F, "normalize", "cosine_similarity"),
    ]
    table.update((function, _norm) for function in norms)
    powers = [*_named(torch, "pow", "float_power"), *_named(Tensor, "pow", "pow_", "float_power", "__pow__")]
    table.update((function, _pow) for function in powers)
    return table | RAZORED


_HANDLERS = _handlers()
