"""Drop-in for Linear."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional
from .base import DropIn


class RazorLinear(DropIn, nn.Linear):
    """Linear that keeps its input pruned."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias, self.razor.pruned, self._flag)
