"""Drop-in modules, and the one table that says which class each of them replaces.

The key is the qualified name of the exact class (a subclass may compute something else, so it needs a line of its own);
the value names the drop-in, or is "sdpa" for attention classes that call F.scaled_dot_product_attention. Names keep
libraries unimported until a model brings one of their classes.
"""

from __future__ import annotations

from importlib import import_module

from torch import nn

from .base import DropIn

_TORCH = "torch.nn.modules"

DROP_INS: dict[str, str] = {
    f"{_TORCH}.linear.Linear": "linear.RazorLinear",
    f"{_TORCH}.conv.Conv2d": "conv.RazorConv2d",
    f"{_TORCH}.batchnorm.BatchNorm1d": "norm.RazorBatchNorm1d",
    f"{_TORCH}.batchnorm.BatchNorm2d": "norm.RazorBatchNorm2d",
    f"{_TORCH}.activation.ReLU": "activation.RazorReLU",
    f"{_TORCH}.activation.ReLU6": "activation.RazorReLU6",
    f"{_TORCH}.activation.Hardtanh": "activation.RazorHardtanh",
    f"{_TORCH}.activation.Hardswish": "activation.RazorHardswish",
    f"{_TORCH}.activation.SiLU": "activation.RazorSiLU",
    f"{_TORCH}.activation.GELU": "activation.RazorGELU",
    f"{_TORCH}.activation.MultiheadAttention": "attention.RazorMultiheadAttention",
    f"{_TORCH}.transformer.TransformerEncoderLayer": "attention.RazorTransformerEncoderLayer",
    f"{_TORCH}.linear.NonDynamicallyQuantizableLinear": "linear.RazorOutProjection",
    f"{_TORCH}.normalization.LayerNorm": "norm.RazorLayerNorm",
    f"{_TORCH}.normalization.GroupNorm": "norm.RazorGroupNorm",
    f"{_TORCH}.dropout.Dropout": "dropout.RazorDropout",
    f"{_TORCH}.pooling.MaxPool2d": "pooling.RazorMaxPool2d",
    f"{_TORCH}.pooling.AdaptiveAvgPool2d": "pooling.RazorAdaptiveAvgPool2d",
    "timm.layers.conv2d_same.Conv2dSame": "timm_layers.RazorConv2dSame",
    "timm.layers.norm_act.BatchNormAct2d": "timm_layers.RazorBatchNormAct2d",
    "timm.layers.norm.LayerNorm": "timm_layers.RazorTimmLayerNorm",
    "timm.layers.norm.LayerNorm2d": "timm_layers.RazorLayerNorm2d",
    "timm.layers.norm.GroupNorm": "timm_layers.RazorTimmGroupNorm",
    "timm.layers.norm.GroupNorm1": "timm_layers.RazorTimmGroupNorm1",
    "timm.layers.activations.GELU": "timm_layers.RazorTimmGELU",
    "timm.layers.activations.GELUTanh": "timm_layers.RazorTimmGELUTanh",
    "timm.layers.activations.QuickGELU": "timm_layers.RazorTimmQuickGELU",
    "timm.layers.layer_scale.LayerScale": "timm_layers.RazorLayerScale",
    "timm.layers.attention.Attention": "sdpa",
    "timm.layers.attention.AttentionRope": "sdpa",
    "timm.models.eva.EvaAttention": "sdpa",
    "timm.models.beit.Attention": "sdpa",
    "timm.models.swin_transformer.WindowAttention": "sdpa",
    "transformers.models.bert.modeling_bert.BertSelfAttention": "sdpa",
    "transformers.models.vit.modeling_vit.ViTSelfAttention": "sdpa",
    "timm.layers.squeeze_excite.SEModule": "timm_layers.RazorSqueezeExcite",
    "timm.models._efficientnet_blocks.SqueezeExcite": "timm_layers.RazorEfficientNetSqueezeExcite",
}

# Attention over windows: index 0 of what is inside counts windows, not images, so pruning a sample would mean something
# else there.
WINDOWED = (
    "timm.models.swin_transformer.WindowAttention",
    "timm.models.swin_transformer_v2.WindowAttention",
    "timm.models.maxxvit.AttentionCl",
    "timm.models.maxxvit.Attention2d",
)


def qualified_name(cls: type) -> str:
    """module.Class, the form of the keys of ``DROP_INS``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def drop_in_for(module: nn.Module) -> type[DropIn] | None:
    """The drop-in of exactly this class, or None."""
    path = DROP_INS.get(qualified_name(type(module)))
    if path is None:
        return None
    if path == "sdpa":
        return import_module(f"{__name__}.attention").sdpa_drop_in(type(module))
    file, name = path.split(".")
    return getattr(import_module(f"{__name__}.{file}"), name)
