"""Drop-ins for activations."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from .. import functional
from .base import DropIn, LayerRules

_BIT = "one bit an element"


class RazorReLU(DropIn, nn.ReLU):
    """ReLU that keeps one bit an element."""

    packs = False

    @classmethod
    def keeps(cls, module: nn.Module, rules: LayerRules) -> str:
        return _BIT

    def forward(self, input: Tensor) -> Tensor:
        return functional.piecewise_linear(input, lambda x: F.relu(x, self.inplace), 0.0, math.nan, self.inplace)


class RazorHardtanh(DropIn, nn.Hardtanh):
    """Hardtanh that keeps one bit an element."""

    packs = False

    @classmethod
    def keeps(cls, module: nn.Module, rules: LayerRules) -> str:
        return _BIT

    def forward(self, input: Tensor) -> Tensor:
        low, high = self.min_val, self.max_val
        return functional.piecewise_linear(input, lambda x: F.hardtanh(x, low, high, self.inplace), low, high, self.inplace)


class RazorReLU6(DropIn, nn.ReLU6):
    """ReLU6 that keeps one bit an element."""

    packs = False

    @classmethod
    def keeps(cls, module: nn.Module, rules: LayerRules) -> str:
        return _BIT

    def forward(self, input: Tensor) -> Tensor:
        return functional.piecewise_linear(input, lambda x: F.relu6(x, self.inplace), 0.0, 6.0, self.inplace)


class _RazorSmooth(DropIn):
    @classmethod
    def refusal(cls, module: nn.Module, rules: LayerRules) -> str | None:
        return "activation=dense" if rules.activation == "dense" else None

    @classmethod
    def keeps(cls, module: nn.Module, rules: LayerRules) -> str:
        return "input in float16" if rules.activation == "float16" else f"derivative in {rules.activation}"


class RazorGELU(_RazorSmooth, nn.GELU):
    """GELU, exact or by tanh, by the activation rule."""

    def forward(self, input: Tensor) -> Tensor:
        name = "gelu" if self.approximate == "none" else "gelu_tanh"
        return functional.smooth(input, name, self.razor.activation, self._flag)


class RazorSiLU(_RazorSmooth, nn.SiLU):
    """SiLU by the activation rule."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.smooth(input, "silu", self.razor.activation, self._flag, self.inplace)


class RazorHardswish(_RazorSmooth, nn.Hardswish):
    """Hardswish by the activation rule."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.smooth(input, "hardswish", self.razor.activation, self._flag, self.inplace)
