"""Drop-in for Linear."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional
from .base import DropIn
from .fusion import chain_of


class RazorLinear(DropIn, nn.Linear):
    """Linear that keeps its input pruned; where it leads a chain, it runs the activation too (see fusion.py)."""

    link = "linear"
    prunes = True

    def forward(self, input: Tensor) -> Tensor:
        arguments = self.razor.pruned, self.flag_for(input)
        chain = chain_of(self, input)
        act = chain.activation.epilogue() if chain is not None and input.dim() > 1 else None
        if act is None:
            return functional.linear(input, self.weight, self.bias, *arguments)
        return chain.done(functional.linear_act(input, self.weight, self.bias, act, *arguments))


class RazorOutProjection(RazorLinear, nn.modules.linear.NonDynamicallyQuantizableLinear):
    """The output projection inside MultiheadAttention."""
