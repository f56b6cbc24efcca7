"""Drop-in for Linear."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional
from .base import DropIn


class RazorLinear(DropIn, nn.Linear):
    """Linear that keeps its input pruned; where it leads a chain, it runs the activation too (see fusion.py)."""

    link = "linear"
    prunes = True

    def forward(self, input: Tensor) -> Tensor:
        followers = self.__dict__.get("_backrazor_followers")
        if followers is None:
            return functional.linear(input, self.weight, self.bias, self.razor.pruned, self._flag)
        (activation,) = followers
        act = activation.epilogue()
        if act is None or input.dim() < 2:
            out = functional.linear(input, self.weight, self.bias, self.razor.pruned, self._flag)
            return activation.activate(out)
        return functional.linear_act(input, self.weight, self.bias, act, self.razor.pruned, self._flag)


class RazorOutProjection(RazorLinear, nn.modules.linear.NonDynamicallyQuantizableLinear):
    """The output projection inside MultiheadAttention."""
