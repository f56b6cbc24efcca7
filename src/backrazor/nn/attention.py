"""Drop-ins for attention.

Most implementations end in ``F.scaled_dot_product_attention``; their drop-in runs the original forward with that one
function replaced. Where the call has a form that the pruned operator does not have, PyTorch's own runs and attention
stays dense for that call.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .. import functional
from ..codecs import smooth_word
from ..functional.rest import exactly
from ..functional.transforms import refuse_tracing
from .base import DropIn, LayerRules, MadeDropIn, made
from .linear import RazorLinear

_WORDS = {
    "pruned": "q, k, softmax output and v pruned",
    "int8": "q, k and v in int8, softmax recomputed",
    "int4": "q, k and v in int4, softmax recomputed",
}


class _Replaced(TorchFunctionMode):
    """Scaled dot-product attention through the pruned operator."""

    def __init__(self, module: SdpaDropIn) -> None:
        super().__init__()
        self._module = module

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if function is F.linear:
            return self._linear(*args, **kwargs)
        return function(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        rules, late = self._module.razor.attention, self._module.scales_scores

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )

        if not functional.fits_attention(query, key, value, attn_mask, is_causal, enable_gqa):
            with exactly():  # its backward reads inputs and sums that have to agree
                return dense(query, key, value)
        settings = attn_mask, dropout_p, is_causal, scale, rules, self._module.flag_for(query), late
        fused = self._module.calls_fused and not torch.compiler.is_dynamo_compiling()  # a graph holds no function
        return functional.sdpa(query, key, value, *settings, dense if fused else None)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A class may hand a child's weight to F.linear by itself, with a bias of its own: the child's rules hold."""
        for child in self._module.children():
            if isinstance(child, RazorLinear) and child.weight is weight:
                return functional.linear(x, weight, bias, child.razor.pruned, child.flag_for(x))
        return F.linear(x, weight, bias)


class SdpaDropIn(MadeDropIn):
    """The original forward, its attention product pruned or quantised.

    ``scales_scores``: whether its unfused formula scales q k^T rather than q, which rounds differently.
    """

    scales_scores = False

    @classmethod
    def refusal(cls, module: nn.Module, rules: LayerRules) -> str | None:
        return "attention=dense" if rules.attention.rule == "dense" else None

    @classmethod
    def keeps(cls, module: nn.Module, rules: LayerRules) -> str:
        return _WORDS[rules.attention.rule]

    @classmethod
    def rules_used(cls, module: nn.Module) -> tuple[str, ...]:
        return ("attention",)

    @property
    def fused_attn(self) -> bool:
        """timm's switch between ``F.scaled_dot_product_attention`` and the formula: on, whatever the layer was set to,
        since an operator takes the place of that function."""
        return True

    @property
    def calls_fused(self) -> bool:
        """What the layer was set to: whether the operator's forward is PyTorch's fused kernel, or the formula."""
        return self.__dict__.get("fused_attn", True)

    @fused_attn.setter
    def fused_attn(self, value: bool) -> None:
        self.__dict__["fused_attn"] = value

    def forward(self, *args: object, **kwargs: object) -> object:
        with _Replaced(self):
            return super().forward(*args, **kwargs)


def sdpa_drop_in(original: type[nn.Module], base: type[SdpaDropIn] = SdpaDropIn) -> type[MadeDropIn]:
    """The drop-in of an attention class that calls ``F.scaled_dot_product_attention``."""
    return made(base, original)


class RazorMultiheadAttention(DropIn, nn.MultiheadAttention):
    """MultiheadAttention whose projections keep their input pruned and whose product follows the attention rule.

    Calls that ask for the weights, or an unbatched input, run PyTorch's own forward.
    """

    @classmethod
    def refusal(cls, module: nn.MultiheadAttention, rules: LayerRules) -> str | None:
        if rules.attention.rule == "dense":
            return "attention=dense"
        if module.bias_k is not None or module.add_zero_attn:
            return "add_bias_kv and add_zero_attn have no pruned form"
        return None

    @classmethod
    def keeps(cls, module: nn.Module, rules: LayerRules) -> str:
        return f"{_WORDS[rules.attention.rule]}; inputs of the projections pruned; dense where need_weights=True"

    @classmethod
    def rules_used(cls, module: nn.Module) -> tuple[str, ...]:
        return "pruned", "attention"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not torch.compiler.is_dynamo_compiling():
            refuse_tracing(query)
        plain = need_weights or not torch.is_grad_enabled()
        if plain or not self._fits(query, key, value, attn_mask, key_padding_mask):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        same = query is key and key is value
        if not self.batch_first:  # the batch is the second axis: samples first, so that pruning sees them
            query = query.transpose(0, 1)
            key, value = (query, query) if same else (key.transpose(0, 1), value.transpose(0, 1))
        heads = [self._split(x) for x in self._project(query, key, value, same)]
        mask = self._mask(attn_mask, key_padding_mask, query, key)
        dropout_p = self.dropout if self.training else 0.0
        scale = 1 / math.sqrt(self.head_dim)
        out = functional.attention(*heads, mask, dropout_p, False, scale, self.razor.attention, self.flag_for(query))
        out = self._projected(out.transpose(1, 2).flatten(2))
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _fits(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, padding: Tensor | None
    ) -> bool:
        """Whether these are a batch of tokens and masks of matching shapes, for all that PyTorch refuses is its own."""
        tensors = (query, key, value)
        if not all(isinstance(x, Tensor) and x.dim() == 3 and x.is_floating_point() for x in tensors):
            return False
        if tuple(x.shape[2] for x in tensors) != (self.embed_dim, self.kdim, self.vdim):
            return False
        batch, queries = query.shape[:2] if self.batch_first else query.shape[1::-1]
        inputs = key.shape[:2] if self.batch_first else key.shape[1::-1]
        keys = inputs[1]
        masks = ((queries, keys), (batch * self.num_heads, queries, keys))
        return (
            key.shape[:2] == value.shape[:2]
            and inputs[0] == batch
            and (attn_mask is None or tuple(attn_mask.shape) in masks)
            and (padding is None or tuple(padding.shape) == (batch, keys))
        )

    def _project(self, query: Tensor, key: Tensor, value: Tensor, same: bool) -> tuple[Tensor, ...]:
        codec, flag = self.razor.pruned, self.flag_for(query)
        if same and self.in_proj_weight is not None:
            return functional.linear(query, self.in_proj_weight, self.in_proj_bias, codec, flag).chunk(3, -1)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = zip((query, key, value), weights, biases, strict=True)
        return tuple(functional.linear(x, weight, bias, codec, flag) for x, weight, bias in inputs)

    def _projected(self, x: Tensor) -> Tensor:
        """By the weights of ``out_proj``, as PyTorch does it: the module itself is not called."""
        out = self.out_proj
        if not isinstance(out, RazorLinear):
            return F.linear(x, out.weight, out.bias)
        return functional.linear(x, out.weight, out.bias, out.razor.pruned, out.flag_for(x))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
        """Both masks, each bool (True is left out) or added, as one to add: (B or 1, H or 1, N or 1, M)."""
        total = None
        if attn_mask is not None:
            shape = (-1, self.num_heads, *attn_mask.shape[1:]) if attn_mask.dim() == 3 else (1, 1, *attn_mask.shape)
            total = _added(attn_mask, query.dtype).reshape(shape)
        if padding is not None:
            extra = _added(padding, query.dtype).view(query.shape[0], 1, 1, key.shape[1])
            total = extra if total is None else total + extra
        return total


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


class RazorTransformerEncoderLayer(DropIn, nn.TransformerEncoderLayer):
    """TransformerEncoderLayer: its feed-forward's activation, a function and no module, by the activation rule."""

    @classmethod
    def keeps(cls, module: nn.Module, rules: LayerRules) -> str:
        return "its activation as one bit or by the activation rule; its parts as listed"

    @classmethod
    def rules_used(cls, module: nn.TransformerEncoderLayer) -> tuple[str, ...]:
        return ("activation",) if module.activation is F.gelu else ()

    @property
    def stored_as(self) -> str:
        """The word of the activation rule that holds for GELU."""
        return smooth_word("gelu", self.razor.activation)

    def _ff_block(self, x: Tensor) -> Tensor:
        x = self.linear1(x)
        if self.activation is F.relu:
            x = functional.piecewise_linear(x, F.relu, 0.0, math.nan)
        elif self.activation is F.gelu:
            x = functional.smooth(x, "gelu", self.razor.activation, self.flag_for(x))
        else:
            x = self.activation(x)
        return self.dropout2(self.linear2(self.dropout(x)))
