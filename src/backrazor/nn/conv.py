"""Drop-in for Conv2d."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from .. import functional
from ..functional.conv import ConvSpec
from ..functional.conv_norm_act import Norm
from .base import DropIn, LayerRules, is_frozen
from .fusion import chain_of, run_ahead


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
        arguments = self.razor.pruned, self.flag_for(input)
        if not isinstance(input, Tensor):
            return super().forward(input)
        made = run_ahead(self, input)
        if made is not None:
            return made
        spec = self._spec(input)
        chain = chain_of(self, input)
        act = None if chain is None or chain.activation is None else chain.activation.epilogue()
        fits = chain is not None and input.dim() == 4 and input.is_contiguous() and self._fits(chain.norm)
        if not fits or (chain.activation is not None and act is None):
            return functional.conv2d(input, self.weight, self.bias, spec, *arguments)
        norm = chain.norm
        frozen = Norm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        return chain.done(functional.conv_norm_act(input, self.weight, self.bias, spec, frozen, act, *arguments))

    def _fits(self, norm: nn.Module) -> bool:
        """Whether the norm is frozen and made for what this convolution gives: what it refuses is its own to say."""
        statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return is_frozen(norm) and all(
            t is None or (t.numel() == self.weight.shape[0] and t.device == self.weight.device) for t in statistics
        )


class RazorConv2d(RazorConvolution, nn.Conv2d):
    """Conv2d, any padding mode, that keeps its input pruned."""

    def _spec(self, x: Tensor) -> ConvSpec:
        spec = ConvSpec(self.stride, self.padding, self.dilation, self.groups)
        if self.padding_mode != "zeros":
            spec = spec._replace(
                padding=(0, 0), pad=tuple(self._reversed_padding_repeated_twice), pad_mode=self.padding_mode
            )
        return spec
