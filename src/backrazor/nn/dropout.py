"""Drop-in for Dropout."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional
from .base import DropIn, LayerRules


class RazorDropout(DropIn, nn.Dropout):
    """Dropout that keeps one bit per element."""

    packs = False

    @classmethod
    def keeps(cls, module: nn.Module, rules: LayerRules) -> str:
        return "one bit per element"

    def forward(self, input: Tensor) -> Tensor:
        return functional.dropout(input, self.p, self.training, self.inplace)
