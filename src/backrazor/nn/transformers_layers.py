"""Drop-ins for layers of Hugging Face transformers. Imported only when a model holds one of them."""

from __future__ import annotations

from torch import nn
from transformers.activations import GELUActivation, QuickGELUActivation, SiLUActivation

from .activation import RazorSmooth
from .attention import SdpaDropIn, sdpa_drop_in
from .base import LayerRules, MadeDropIn


class _AsksForSdpa:
    """A model's configuration, its attention implementation set to the one that is replaced."""

    _attn_implementation = "sdpa"

    def __init__(self, config: object) -> None:
        self._config = config

    def __getattr__(self, name: str) -> object:
        return getattr(self._config, name)


class TransformersAttention(SdpaDropIn):
    """Attention that picks its function by the configuration's attention implementation."""

    @classmethod
    def refusal(cls, module: nn.Module, rules: LayerRules) -> str | None:
        chosen = module.config._attn_implementation
        if chosen not in (None, "eager", "sdpa"):
            return f"attention implementation {chosen}: build the model with attn_implementation='sdpa' or 'eager'"
        return super().refusal(module, rules)

    @classmethod
    def keeps(cls, module: nn.Module, rules: LayerRules) -> str:
        dense = "" if module.config._attn_implementation == "sdpa" else "; dense where its weights are asked for"
        return super().keeps(module, rules) + dense

    @property
    def config(self) -> object:
        """The model's configuration; asking for SDPA, unless the weights are wanted, which only eager attention has."""
        own = self.__dict__["config"]
        wanted = own.output_attentions or "_backrazor_weights" in self.__dict__
        return own if wanted else _AsksForSdpa(own)

    @config.setter
    def config(self, value: object) -> None:
        self.__dict__["config"] = value

    @property
    def scales_scores(self) -> bool:
        """The eager formula scales the scores."""
        return self.__dict__["config"]._attn_implementation != "sdpa"

    def forward(self, *args: object, **kwargs: object) -> object:
        if not kwargs.get("output_attentions"):
            return super().forward(*args, **kwargs)
        self._backrazor_weights = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            del self._backrazor_weights


def attention(original: type[nn.Module]) -> type[MadeDropIn]:
    """The drop-in of an attention class of transformers."""
    return sdpa_drop_in(original, TransformersAttention)


class RazorGELUActivation(RazorSmooth, GELUActivation):
    """transformers' GELU."""

    _function = "gelu"

    @classmethod
    def refusal(cls, module: nn.Module, rules: LayerRules) -> str | None:
        if module.act is not nn.functional.gelu:
            return "GELU written out in Python"
        return super().refusal(module, rules)


class RazorQuickGELUActivation(RazorSmooth, QuickGELUActivation):
    """transformers' QuickGELU."""

    _function = "quick_gelu"


class RazorSiLUActivation(RazorSmooth, SiLUActivation):
    """transformers' SiLU."""

    _function = "silu"
