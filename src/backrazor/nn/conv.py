"""Drop-in for Conv2d."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from .. import functional
from ..functional.conv import ConvSpec
from ..functional.conv_norm_act import Norm
from .base import DropIn, LayerRules, is_frozen
from .norm import batch_norm


class RazorConvolution(DropIn):
    """Keeps the input pruned, before padding. Where the norm that follows is frozen, runs it and the activation too
    (see fusion.py)."""

    link = "conv"
    prunes = True

    @classmethod
    def refusal(cls, module: nn.Conv2d, rules: LayerRules) -> str | None:
        return "complex weights" if module.weight.is_complex() else None

    @abstractmethod
    def _spec(self, x: Tensor) -> ConvSpec:
        """The convolution's settings for this input."""

    def forward(self, input: Tensor) -> Tensor:
        spec = self._spec(input)
        followers = self.__dict__.get("_backrazor_followers")
        if followers is None or not is_frozen(followers[0]):
            return functional.conv2d(input, self.weight, self.bias, spec, self.razor.pruned, self._flag)
        return self._chain(input, spec, *followers)

    def _chain(self, x: Tensor, spec: ConvSpec, norm: nn.Module, activation: nn.Module | None = None) -> Tensor:
        act = None if activation is None else activation.epilogue()
        if x.dim() == 4 and x.is_contiguous() and (activation is None or act is not None):
            frozen = Norm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
            return functional.conv_norm_act(x, self.weight, self.bias, spec, frozen, act, self.razor.pruned, self._flag)
        y = functional.conv2d(x, self.weight, self.bias, spec, self.razor.pruned, self._flag)
        y = batch_norm(norm, y)
        return y if activation is None else activation.activate(y)


class RazorConv2d(RazorConvolution, nn.Conv2d):
    """Conv2d, any padding mode, that keeps its input pruned."""

    def _spec(self, x: Tensor) -> ConvSpec:
        spec = ConvSpec(self.stride, self.padding, self.dilation, self.groups)
        if self.padding_mode != "zeros":
            spec = spec._replace(
                padding=(0, 0), pad=tuple(self._reversed_padding_repeated_twice), pad_mode=self.padding_mode
            )
        return spec
