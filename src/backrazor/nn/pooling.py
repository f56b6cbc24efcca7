"""Drop-ins for pooling."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.modules.utils import _pair, _triple

from .. import functional
from ..functional.pooling import MOST_PLACES
from .base import DropIn, LayerRules
from .fusion import hands_through


class _RazorMaxPool(DropIn):
    """Max pooling that keeps the place in the window, 8 bits per output element."""

    packs = False
    may_hand_through = True
    sizes = staticmethod(_pair)  # a setting for each spatial dimension

    @classmethod
    def refusal(cls, module: nn.MaxPool2d | nn.MaxPool3d, rules: LayerRules) -> str | None:
        if math.prod(cls.sizes(module.kernel_size)) > MOST_PLACES:
            return "a window of more than 256 elements does not fit an 8-bit index"
        if module.return_indices:
            return "return_indices=True hands out the wide index"
        return None

    @classmethod
    def keeps(cls, module: nn.Module, rules: LayerRules) -> str:
        return "8-bit window index"

    def forward(self, input: Tensor) -> Tensor:
        if hands_through(self, input):
            return input
        stride = self.kernel_size if self.stride is None else self.stride
        settings = map(self.sizes, (self.kernel_size, stride, self.padding, self.dilation))
        return functional.max_pool(input, *settings, self.ceil_mode)


class RazorMaxPool2d(_RazorMaxPool, nn.MaxPool2d):
    """MaxPool2d that keeps the place in the window, 8 bits per output element."""


class RazorMaxPool3d(_RazorMaxPool, nn.MaxPool3d):
    """MaxPool3d that keeps the place in the window, 8 bits per output element."""

    sizes = staticmethod(_triple)


class RazorAdaptiveAvgPool2d(DropIn, nn.AdaptiveAvgPool2d):
    """AdaptiveAvgPool2d that keeps a shape."""

    packs = False

    @classmethod
    def keeps(cls, module: nn.Module, rules: LayerRules) -> str:
        return "a shape"

    def forward(self, input: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(input, self.output_size)


class RazorAvgPool2d(DropIn, nn.AvgPool2d):
    """AvgPool2d that keeps a shape."""

    packs = False
    keeps = RazorAdaptiveAvgPool2d.keeps

    def forward(self, input: Tensor) -> Tensor:
        stride = self.kernel_size if self.stride is None else self.stride
        settings = (_pair(self.kernel_size), _pair(stride), _pair(self.padding))
        return functional.avg_pool2d(input, *settings, self.ceil_mode, self.count_include_pad, self.divisor_override)
