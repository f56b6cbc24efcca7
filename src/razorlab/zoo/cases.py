"""A network of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

LARGEST = 120_000_000  # parameters of a network that is tried


@dataclass
class Case:
    """A network to try: ``make`` gives the module and a function that runs it to a list of float outputs."""

    name: str
    network: str
    make: Callable[[], tuple[nn.Module, Callable[[nn.Module], list[Tensor]]]]


def floats(output: Any) -> list[Tensor]:
    """The float tensors of an output that depend on what is trained, each once."""
    leaves = list(output.values()) if isinstance(output, dict) else output
    found = [x for x in tree_leaves(leaves) if isinstance(x, Tensor) and x.is_floating_point()]
    return list({id(x): x for x in found}.values())
