"""Drop-ins for layers of Hugging Face transformers. Imported only when a model holds one of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from types import CodeType
from typing import Any

from torch import Tensor, nn
from transformers.activations import (
    AccurateGELUActivation,
    FastGELUActivation,
    GELUActivation,
    GELUTanh,
    NewGELUActivation,
    QuickGELUActivation,
    SiLUActivation,
)
from transformers.pytorch_utils import Conv1D

from .. import functional
from .activation import RazorSmooth
from .attention import SdpaDropIn, sdpa_drop_in
from .base import DropIn, LayerRules, MadeDropIn, made
from .norm import RazorLayerNorm


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
        return not self.calls_fused

    @property
    def calls_fused(self) -> bool:
        """Whether the model was built with SDPA."""
        return self.__dict__["config"]._attn_implementation == "sdpa"

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


class _Formula(RazorSmooth):
    """An activation whose class writes the function out, or may: its own forward computes."""

    @property
    def _dense(self) -> Callable[[Tensor], Tensor]:
        return self.original_forward


class RazorGELUActivation(_Formula, GELUActivation):
    """transformers' GELU, by PyTorch's function or written out."""

    _function = "gelu"
    original_forward = GELUActivation.forward

    @property
    def _dense(self) -> Callable[[Tensor], Tensor] | None:
        return None if self.act is nn.functional.gelu else super()._dense


class RazorNewGELUActivation(_Formula, NewGELUActivation):
    """GELU by tanh, as GPT-2 writes it."""

    _function = "gelu_tanh"
    original_forward = NewGELUActivation.forward


class RazorFastGELUActivation(_Formula, FastGELUActivation):
    """GELU by tanh, written another way."""

    _function = "gelu_tanh"
    original_forward = FastGELUActivation.forward


class RazorAccurateGELUActivation(_Formula, AccurateGELUActivation):
    """GELU by tanh, written a third way."""

    _function = "gelu_tanh"
    original_forward = AccurateGELUActivation.forward


class RazorGELUTanh(_Formula, GELUTanh):
    """GELU by tanh, by PyTorch's function or written out."""

    _function = "gelu_tanh"
    original_forward = GELUTanh.forward


class TanhGELU(MadeDropIn, RazorSmooth):
    """GELU by tanh in a class of a model's own."""

    _function = "gelu_tanh"

    @property
    def _dense(self) -> Callable[[Tensor], Tensor]:
        return partial(vars(type(self))["_made_for"].forward, self)


def tanh_gelu(original: type[nn.Module]) -> type[MadeDropIn]:
    """The drop-in of a class that computes GELU by tanh."""
    return made(TanhGELU, original)


class RazorQuickGELUActivation(RazorSmooth, QuickGELUActivation):
    """transformers' QuickGELU."""

    _function = "quick_gelu"


class RazorSiLUActivation(RazorSmooth, SiLUActivation):
    """transformers' SiLU."""

    _function = "silu"


class RazorConv1D(DropIn, Conv1D):
    """GPT-2's Linear, whose weight is (inputs, outputs)."""

    prunes = True

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[-1] != self.weight.shape[0]:
            return super().forward(x)
        return functional.linear(x, self.weight.t(), self.bias, self.razor.pruned, self.flag_for(x))


class TransformersRMSNorm(MadeDropIn):
    """An RMSNorm of transformers, which each model writes out for itself: its own forward computes."""

    refusal = RazorLayerNorm.refusal
    keeps = RazorLayerNorm.keeps
    rules_used = RazorLayerNorm.rules_used
    _offset: float  # what the class adds to its weight

    @classmethod
    def members_for(cls, original: type[nn.Module]) -> dict[str, Any]:
        return {"_offset": _arithmetic(original) or 0.0}

    def forward(self, x: Tensor) -> Tensor:
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        return functional.rms_norm(
            x,
            x.shape[-1:],
            getattr(self, "weight", None),
            eps,
            self.razor.norm,
            self.flag_for(x),
            super().forward,
            self._offset,
        )


# Classes whose arithmetic is known, and what they add to their weight. Most models hold a copy of one of them.
_RMS_NORMS = {
    "llama.modeling_llama.LlamaRMSNorm": 0.0,
    "olmo2.modeling_olmo2.Olmo2RMSNorm": 0.0,
    "gpt_oss.modeling_gpt_oss.GptOssRMSNorm": 0.0,
    "gemma.modeling_gemma.GemmaRMSNorm": 1.0,
    "gemma2.modeling_gemma2.Gemma2RMSNorm": 1.0,
    "gemma3.modeling_gemma3.Gemma3RMSNorm": 1.0,
    "t5.modeling_t5.T5LayerNorm": 0.0,
    "nanochat.modeling_nanochat.NanoChatRMSNorm": 0.0,
}


@cache
def _arithmetic(cls: type[nn.Module]) -> float | None:
    """What a class adds to its weight, if its functions are compiled to the code of a class in ``_RMS_NORMS``; else
    None."""
    own = _code(cls)
    if own is None:
        return None
    for path, offset in _RMS_NORMS.items():
        file, _, name = path.rpartition(".")
        try:
            known = getattr(import_module(f"transformers.models.{file}"), name)
        except (ImportError, AttributeError):  # another version
            continue
        if own == _code(known):
            return offset
    return None


def _code(cls: type[nn.Module]) -> tuple | None:
    """The code that runs when a norm of this class is called, comparable; None for classes that are no such norm."""
    functions = [vars(cls).get("forward"), vars(cls).get("_norm")]
    if functions[0] is None or cls.__base__ is not nn.Module:
        return None
    codes = [getattr(function, "__code__", None) for function in functions if function is not None]
    if any(code is None for code in codes):
        return None
    return tuple((code.co_code, code.co_names, code.co_argcount, _constants(code)) for code in codes)


def _constants(code: CodeType) -> tuple:
    return tuple(constant for constant in code.co_consts if not isinstance(constant, str))


def by_arithmetic(cls: type[nn.Module]) -> type[DropIn] | None:
    """The drop-in of a class of transformers that the table does not name, by what it computes; None where that is
    not known."""
    if "Norm" not in cls.__name__ or _arithmetic(cls) is None:
        return None
    return made(TransformersRMSNorm, cls)
