"""Drop-in modules, and the one table that says which class each of them replaces.

The key is the qualified name of the exact class (a subclass may compute something else, so it needs a line of its own); the value names the
drop-in. Names keep libraries unimported until a model brings one of their classes.
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
    f"{_TORCH}.dropout.Dropout": "dropout.RazorDropout",
    f"{_TORCH}.pooling.MaxPool2d": "pooling.RazorMaxPool2d",
    f"{_TORCH}.pooling.AdaptiveAvgPool2d": "pooling.RazorAdaptiveAvgPool2d",
    "timm.layers.conv2d_same.Conv2dSame": "timm_layers.RazorConv2dSame",
    "timm.layers.norm_act.BatchNormAct2d": "timm_layers.RazorBatchNormAct2d",
    "timm.layers.squeeze_excite.SEModule": "timm_layers.RazorSqueezeExcite",
    "timm.models._efficientnet_blocks.SqueezeExcite": "timm_layers.RazorEfficientNetSqueezeExcite",
}


def qualified_name(cls: type) -> str:
    """module.Class, the form of the keys of ``DROP_INS``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def drop_in_for(module: nn.Module) -> type[DropIn] | None:
    """The drop-in of exactly this class, or None."""
    path = DROP_INS.get(qualified_name(type(module)))
    if path is None:
        return None
    file, name = path.split(".")
    return getattr(import_module(f"{__name__}.{file}"), name)
