"""The operators as nodes of the graph that Dynamo writes.

Dynamo does not look inside: what they do is recorded by the stage behind it, which runs them as Python on tensors that
stand for others, autograd included. Imported while Dynamo traces, and only then: the registration imports the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from .transforms import NODES


def _in_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as one node. No torch-function mode sees what it calls."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return torch._dynamo.allow_in_graph(call)


IN_GRAPH = {name: _in_graph(function) for name, function in NODES.items()}
