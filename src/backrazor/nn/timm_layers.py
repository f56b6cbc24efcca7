"""Drop-ins for layers of timm. Imported only when a model holds one of them."""

from __future__ import annotations

from timm.layers import BatchNormAct2d, Conv2dSame, SqueezeExcite
from timm.models._efficientnet_blocks import SqueezeExcite as EfficientNetSqueezeExcite
from torch import Tensor, nn

from .. import functional
from ..functional.conv import ConvSpec
from .base import DropIn, LayerRules
from .norm import batch_norm, norm_words


def _same_padding(size: int, kernel: int, stride: int, dilation: int) -> int:
    """Total padding under which the output has ceil(size / stride) elements, as TensorFlow defines "SAME"."""
    return max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)


class RazorConv2dSame(DropIn, Conv2dSame):
    """Conv2dSame that keeps its input pruned, before padding."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = (
            _same_padding(*item) for item in zip(x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True)
        )
        pad = (width // 2, width - width // 2, height // 2, height - height // 2)
        spec = ConvSpec(self.stride, (0, 0), self.dilation, self.groups, pad=pad)
        return functional.conv2d(x, self.weight, self.bias, spec, self.razor.pruned, self._flag)


class RazorBatchNormAct2d(DropIn, BatchNormAct2d):
    """BatchNorm and activation: the norm by its rule, the activation by the drop-in of its own."""

    @classmethod
    def keeps(cls, module: BatchNormAct2d, rules: LayerRules) -> str:
        return f"on running statistics nothing, else {norm_words(rules)}"

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(batch_norm(self, x)))


class _RazorGate(DropIn):
    """x times a gate a channel: the product keeps the feature map pruned."""

    @classmethod
    def keeps(cls, module: nn.Module, rules: LayerRules) -> str:
        return super().keeps(module, rules) + "; the gate dense"

    def _product(self, x: Tensor, gate: Tensor) -> Tensor:
        return functional.channel_scale(x, gate, self.razor.pruned, self._flag)


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
