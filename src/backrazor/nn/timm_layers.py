"""Drop-ins for layers of timm. Imported only when a model holds one of them."""

from __future__ import annotations

from timm.layers import (
    BatchNormAct2d,
    Conv2dSame,
    GroupNorm,
    GroupNorm1,
    LayerNorm,
    LayerNorm2d,
    LayerScale,
    LayerScale2d,
    Linear,
    SqueezeExcite,
)
from timm.layers.activations import GELU, GELUTanh, QuickGELU
from timm.models._efficientnet_blocks import SqueezeExcite as EfficientNetSqueezeExcite
from torch import Tensor, nn

from .. import functional
from ..functional.conv import ConvSpec
from .activation import RazorSmooth
from .base import UNKNOWN, DropIn, LayerRules
from .conv import RazorConvolution
from .fusion import hands_through
from .linear import RazorLinear
from .norm import RazorBatchNorm2d, RazorGroupNorm, RazorLayerNorm, batch_norm, norm_words


def _same_padding(size: int, kernel: int, stride: int, dilation: int) -> int:
    """Total padding under which the output has ceil(size / stride) elements, as TensorFlow defines "SAME"."""
    return max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)


class RazorTimmLinear(RazorLinear, Linear):
    """timm's Linear."""


class RazorConv2dSame(RazorConvolution, Conv2dSame):
    """Conv2dSame that keeps its input pruned, before padding."""

    def _spec(self, x: Tensor) -> ConvSpec:
        height, width = (
            _same_padding(*item)
            for item in zip(x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True)
        )
        pad = (width // 2, width - width // 2, height // 2, height - height // 2)
        return ConvSpec(self.stride, (0, 0), self.dilation, self.groups, pad=pad)


class RazorBatchNormAct2d(DropIn, BatchNormAct2d):
    """BatchNorm and activation: the norm by its rule, the activation by the drop-in of its own."""

    link = "norm"
    rules_used = RazorBatchNorm2d.rules_used

    @classmethod
    def keeps(cls, module: BatchNormAct2d, rules: LayerRules) -> str:
        return f"on running statistics nothing, else {norm_words(rules)}"

    def inner_activation(self) -> nn.Module | object | None:
        """The activation that this layer ends with; ``UNKNOWN`` where the layer cannot be part of a chain."""
        if type(self.act) is nn.Identity and type(self.drop) is nn.Identity:
            return None
        usable = isinstance(self.act, DropIn) and self.act.link == "activation" and type(self.drop) is nn.Identity
        return self.act if usable else UNKNOWN

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.dim() != 4:
            return super().forward(x)
        return x if hands_through(self, x) else self.act(self.drop(batch_norm(self, x)))


class _RazorGate(DropIn):
    """x times one gate per channel: the product keeps the feature map pruned."""

    @classmethod
    def keeps(cls, module: nn.Module, rules: LayerRules) -> str:
        return super().keeps(module, rules) + "; the gate dense"

    def _product(self, x: Tensor, gate: Tensor) -> Tensor:
        return functional.channel_scale(x, gate, self.razor.pruned, self.flag_for(x))


class RazorEfficientNetSqueezeExcite(_RazorGate, EfficientNetSqueezeExcite):
    """The squeeze-excite of timm's EfficientNet and MobileNet blocks."""

    def forward(self, x: Tensor) -> Tensor:
        squeezed = self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True)))
        return self._product(x, self.gate(self.conv_expand(squeezed)))


class RazorSqueezeExcite(_RazorGate, SqueezeExcite):
    """The general squeeze-excite of timm.layers."""

    def forward(self, x: Tensor) -> Tensor:
        squeezed = x.mean((2, 3), keepdim=True)
        if self.add_maxpool:
            squeezed = 0.5 * squeezed + 0.5 * x.amax((2, 3), keepdim=True)
        squeezed = self.fc2(self.act(self.bn(self.fc1(squeezed))))
        return self._product(x, self.gate(squeezed))


class RazorTimmLayerNorm(RazorLayerNorm, LayerNorm):
    """timm's LayerNorm."""


class RazorLayerNorm2d(RazorLayerNorm, LayerNorm2d):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class RazorTimmGroupNorm(RazorGroupNorm, GroupNorm):
    """timm's GroupNorm."""


class RazorTimmGroupNorm1(RazorGroupNorm, GroupNorm1):
    """GroupNorm with one group."""


class RazorTimmGELU(RazorSmooth, GELU):
    """timm's GELU."""

    _function = "gelu"


class RazorTimmGELUTanh(RazorSmooth, GELUTanh):
    """timm's GELU by tanh."""

    _function = "gelu_tanh"


class RazorTimmQuickGELU(RazorSmooth, QuickGELU):
    """timm's QuickGELU."""

    _function = "quick_gelu"


class RazorLayerScale(_RazorGate, LayerScale):
    """LayerScale whose product keeps the scaled map pruned."""

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, self.gamma)


class RazorLayerScale2d(_RazorGate, LayerScale2d):
    """LayerScale over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, self.gamma.view(1, -1, 1, 1))
