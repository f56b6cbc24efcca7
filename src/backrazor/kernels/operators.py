"""How a primitive becomes an operator of ``torch.library`` with a fake implementation, so that shapes and bytes are
known without running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._compile import _disable_dynamo

HOST_CODE: dict[
    str, Callable[..., Any]
] = {}  # what runs on real tensors, by the operator's name: to count its launches
# what that takes on CUDA in passing, beside what it returns: bytes by the operator's arguments
SCRATCH: dict[str, Callable[..., int]] = {}
library = torch.library.Library("backrazor", "DEF")


def operator(
    schema: str, fake: Callable[..., Any], scratch: Callable[..., int] | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Define an operator: the decorated function runs on real tensors of any device, ``fake`` gives shapes, ``scratch``
    the bytes that it takes on CUDA in passing."""
    name = schema.split("(")[0]
    if scratch is not None:
        SCRATCH[name] = scratch
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def register(function: Callable[..., Any]) -> Any:
        # after a graph break Dynamo would compile the body itself, and the kernels take addresses of its tensors
        opaque = _disable_dynamo(function)
        HOST_CODE[name] = function
        library.impl(name, opaque, "CompositeExplicitAutograd")
        torch.library.register_fake(f"backrazor::{name}", fake, lib=library)
        return getattr(torch.ops.backrazor, name).default

    return register


def scratch_of(function: torch._ops.OpOverload, args: tuple[Any, ...]) -> int:
    """Bytes that a call of an operator, of this library or another, takes in passing where its first argument lies;
    known of this library's on CUDA alone."""
    scratch = SCRATCH.get(function._schema.name.removeprefix("backrazor::"))
    return scratch(*args) if scratch is not None and args[0].device.type == "cuda" else 0
