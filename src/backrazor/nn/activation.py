"""Drop-ins for activations."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from .. import functional
from ..codecs import Bits, Levels, smooth_codec, smooth_word
from ..functional.epilogue import Epilogue
from .base import DropIn, LayerRules
from .fusion import hands_through


class _RazorActivation(DropIn):
    """``activate`` computes; ``forward`` skips it where the chain before has (see fusion.py)."""

    link = "activation"

    @abstractmethod
    def activate(self, x: Tensor) -> Tensor:
        """The activation, with what its backward needs."""

    @abstractmethod
    def epilogue(self) -> Epilogue | None:
        """The activation as the end of a fused chain, None where it cannot be one."""

    def forward(self, input: Tensor) -> Tensor:
        return input if hands_through(self, input) else self.activate(input)


class _PiecewiseLinear(_RazorActivation):
    packs = False

    @classmethod
    def keeps(cls, module: nn.Module, rules: LayerRules) -> str:
        return "one bit per element"


class RazorReLU(_PiecewiseLinear, nn.ReLU):
    """ReLU that keeps one bit per element."""

    def activate(self, x: Tensor) -> Tensor:
        return functional.piecewise_linear(x, lambda x: F.relu(x, self.inplace), 0.0, math.nan, self.inplace)

    def epilogue(self) -> Bits:
        return Bits()


class RazorHardtanh(_PiecewiseLinear, nn.Hardtanh):
    """Hardtanh that keeps one bit per element."""

    def activate(self, x: Tensor) -> Tensor:
        low, high = self.min_val, self.max_val
        return functional.piecewise_linear(x, lambda x: F.hardtanh(x, low, high, self.inplace), low, high, self.inplace)

    def epilogue(self) -> Bits:
        return Bits(self.min_val, self.max_val)


class RazorReLU6(_PiecewiseLinear, nn.ReLU6):
    """ReLU6 that keeps one bit per element."""

    def activate(self, x: Tensor) -> Tensor:
        return functional.piecewise_linear(x, lambda x: F.relu6(x, self.inplace), 0.0, 6.0, self.inplace)

    def epilogue(self) -> Bits:
        return Bits(0.0, 6.0)


class RazorSmooth(_RazorActivation):
    """A smooth activation by the activation rule; subclasses name their function."""

    @classmethod
    def refusal(cls, module: nn.Module, rules: LayerRules) -> str | None:
        return "activation=dense" if rules.activation == "dense" else None

    @classmethod
    def keeps(cls, module: nn.Module, rules: LayerRules) -> str:
        function = cls._function
        word = smooth_word(function.fget(module) if isinstance(function, property) else function, rules.activation)
        return "input in float16" if word == "float16" else f"derivative in {word}"

    @classmethod
    def rules_used(cls, module: nn.Module) -> tuple[str, ...]:
        return ("activation",)

    @property
    @abstractmethod
    def _function(self) -> str:
        """Its name in ``functional.ACTIVATIONS``."""

    @property
    def stored_as(self) -> str:
        """The word of the activation rule that holds for its function."""
        return smooth_word(self._function, self.razor.activation)

    # The forward of the layer, where it computes the function by a formula of its own.
    _dense: Callable[[Tensor], Tensor] | None = None

    def activate(self, x: Tensor) -> Tensor:
        inplace = getattr(self, "inplace", False)
        return functional.smooth(x, self._function, self.razor.activation, self.flag_for(x), inplace, self._dense)

    def epilogue(self) -> Epilogue | None:
        codec = smooth_codec(self._function, self.razor.activation)
        return codec if isinstance(codec, Levels) and self._dense is None else None


class RazorGELU(RazorSmooth, nn.GELU):
    """GELU, exact or by tanh, by the activation rule."""

    @property
    def _function(self) -> str:
        return "gelu" if self.approximate == "none" else "gelu_tanh"


class RazorSiLU(RazorSmooth, nn.SiLU):
    """SiLU by the activation rule."""

    _function = "silu"


class RazorHardswish(RazorSmooth, nn.Hardswish):
    """Hardswish by the activation rule."""

    _function = "hardswish"
