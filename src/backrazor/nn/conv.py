"""Drop-in for Conv2d."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional
from ..functional.conv import ConvSpec
from .base import DropIn, LayerRules


class RazorConv2d(DropIn, nn.Conv2d):
    """Conv2d, any padding mode, that keeps its input pruned."""

    @classmethod
    def refusal(cls, module: nn.Conv2d, rules: LayerRules) -> str | None:
        if module.weight.is_complex():
            return "complex weights"
        return None

    def forward(self, input: Tensor) -> Tensor:
        spec = ConvSpec(self.stride, self.padding, self.dilation, self.groups)
        if self.padding_mode != "zeros":
            spec = spec._replace(padding=(0, 0), pad=tuple(self._reversed_padding_repeated_twice), pad_mode=self.padding_mode)
        return functional.conv2d(input, self.weight, self.bias, spec, self.razor.pruned, self._flag)
