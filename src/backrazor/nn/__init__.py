"""Drop-in modules, the one table that says which class each of them replaces, and ``register`` for other classes.

The key is the qualified name of the exact class (a subclass may compute something else, so it needs a line of its own).
The value names the drop-in, or, with parentheses, the function that makes one of the class. Names keep libraries
unimported until a model brings one of their classes.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from importlib import import_module
from weakref import WeakKeyDictionary

from torch import nn

from .base import DropIn, LayerRules

__all__ = [
    "DROP_INS",
    "DropIn",
    "LayerRules",
    "Registration",
    "drop_in_for",
    "drop_in_of",
    "qualified_name",
    "register",
]

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
    f"{_TORCH}.normalization.RMSNorm": "norm.RazorRMSNorm",
    f"{_TORCH}.dropout.Dropout": "dropout.RazorDropout",
    f"{_TORCH}.pooling.MaxPool2d": "pooling.RazorMaxPool2d",
    f"{_TORCH}.pooling.MaxPool3d": "pooling.RazorMaxPool3d",
    f"{_TORCH}.pooling.AdaptiveAvgPool2d": "pooling.RazorAdaptiveAvgPool2d",
    f"{_TORCH}.pooling.AvgPool2d": "pooling.RazorAvgPool2d",
    "timm.layers.linear.Linear": "timm_layers.RazorTimmLinear",
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
    "timm.layers.layer_scale.LayerScale2d": "timm_layers.RazorLayerScale2d",
    "timm.layers.attention.Attention": "attention.sdpa_drop_in()",
    "timm.layers.attention.AttentionRope": "attention.sdpa_drop_in()",
    "timm.models.eva.EvaAttention": "attention.sdpa_drop_in()",
    "timm.models.beit.Attention": "attention.sdpa_drop_in()",
    "timm.models.swin_transformer.WindowAttention": "attention.sdpa_drop_in()",
    "timm.layers.squeeze_excite.SEModule": "timm_layers.RazorSqueezeExcite",
    "timm.models._efficientnet_blocks.SqueezeExcite": "timm_layers.RazorEfficientNetSqueezeExcite",
    "transformers.activations.GELUActivation": "transformers_layers.RazorGELUActivation",
    "transformers.activations.NewGELUActivation": "transformers_layers.RazorNewGELUActivation",
    "transformers.activations.FastGELUActivation": "transformers_layers.RazorFastGELUActivation",
    "transformers.activations.AccurateGELUActivation": "transformers_layers.RazorAccurateGELUActivation",
    "transformers.activations.GELUTanh": "transformers_layers.RazorGELUTanh",
    "transformers.activations.QuickGELUActivation": "transformers_layers.RazorQuickGELUActivation",
    "transformers.activations.SiLUActivation": "transformers_layers.RazorSiLUActivation",
    "transformers.models.bloom.modeling_bloom.BloomGelu": "transformers_layers.tanh_gelu()",
    "transformers.pytorch_utils.Conv1D": "transformers_layers.RazorConv1D",
    "transformers.models.bert.modeling_bert.BertSelfAttention": "transformers_layers.attention()",
    "transformers.models.bert.modeling_bert.BertCrossAttention": "transformers_layers.attention()",
    "transformers.models.vit.modeling_vit.ViTAttention": "transformers_layers.attention()",
}

# What stays as it is and what that means for memory, where "no drop-in for this class" would say too little; None where
# there is nothing to say.
STAYS: dict[str, str | None] = {
    f"{_TORCH}.linear.Identity": None,
    f"{_TORCH}.flatten.Flatten": None,
    f"{_TORCH}.flatten.Unflatten": None,
    f"{_TORCH}.container.Sequential": None,
    f"{_TORCH}.sparse.Embedding": "keeps its indices",
    f"{_TORCH}.activation.Softmax": "keeps its output, as the rest, where it is called: in no attention drop-in",
    "timm.layers.drop.DropPath": "keeps one number per sample",
    "timm.layers.adaptive_avgmax_pool.FastAdaptiveAvgPool": "keeps a shape",
    "timm.layers.mlp.GluMlp": "the product of its two halves is met as a function, by the gate rule",
    "timm.layers.mlp.SwiGLU": "the product of its two halves is met as a function, by the gate rule",
    "timm.models.levit.Downsample": "keeps a shape",
    "timm.models.vision_transformer.VisionTransformer": None,  # adding and joining tokens keeps nothing
    "transformers.models.vit.modeling_vit.ViTEmbeddings": None,
}

# What ``register`` was told, by the class itself: in a notebook two classes may have one name.
_REGISTERED: dict[type[nn.Module], type[DropIn]] = {}


def qualified_name(cls: type) -> str:
    """module.Class, the form of the keys of ``DROP_INS``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def drop_in_for(module: nn.Module) -> type[DropIn] | None:
    """The drop-in of exactly this module's class, or None."""
    return drop_in_of(type(module))


def drop_in_of(cls: type[nn.Module]) -> type[DropIn] | None:
    """The drop-in of exactly this class, or None."""
    return _REGISTERED.get(cls) or _shipped(cls)


# What has been looked up; a user's own classes live no longer for it.
_LOOKED_UP: MutableMapping[type[nn.Module], type[DropIn] | None] = WeakKeyDictionary()


def _shipped(cls: type[nn.Module]) -> type[DropIn] | None:
    """The drop-in that ``DROP_INS`` names for this class."""
    if cls not in _LOOKED_UP:
        _LOOKED_UP[cls] = _resolve(cls)
    return _LOOKED_UP[cls]


def _resolve(cls: type[nn.Module]) -> type[DropIn] | None:
    path = DROP_INS.get(qualified_name(cls))
    if path is None and cls.__module__.startswith("transformers.models."):
        return import_module(f"{__name__}.transformers_layers").by_arithmetic(cls)
    if path is None:
        return None
    file, name = path.split(".")
    found = getattr(import_module(f"{__name__}.{file}"), name.removesuffix("()"))
    return found(cls) if name.endswith("()") else found


class Registration:
    """What ``register`` returns. ``remove()`` undoes it, and so does the end of a ``with`` block."""

    def __init__(self, layer: type[nn.Module], drop_in: type[DropIn]) -> None:
        self.layer, self.drop_in = layer, drop_in

    def remove(self) -> None:
        """Forget the drop-in. Layers that ``razor_`` has converted stay drop-ins until ``unrazor_``. Safe to repeat."""
        if _REGISTERED.get(self.layer) is self.drop_in:
            del _REGISTERED[self.layer]

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def register(layer: type[nn.Module], drop_in: type[DropIn]) -> Registration:
    """From now on ``razor_`` puts ``drop_in`` in the place of every module whose class is exactly ``layer``.

    What a drop-in has to be is said at ``backrazor.nn.DropIn``. The registration holds for this process.

    Args:
        layer: a module class of your own.
        drop_in: a subclass of both ``backrazor.nn.DropIn`` (named first) and ``layer``, such as
            ``class RazorMyLayer(DropIn, MyLayer)``.

    Returns:
        A handle with ``remove()``, which is also a context manager.

    Raises:
        TypeError: one of the two is no class, ``layer`` is no plain module class, or ``drop_in`` is not a subclass of
            both, has an ``__init__``, or names ``DropIn`` after ``layer``.
        ValueError: ``layer`` has a drop-in already, or ``drop_in`` takes part in chains.
    """
    for cls in (layer, drop_in):
        if not isinstance(cls, type):
            raise TypeError(f"register takes two classes, not {cls!r:.100}: use register(MyLayer, RazorMyLayer)")
    if not issubclass(layer, nn.Module) or issubclass(layer, DropIn):
        raise TypeError(f"register takes the class of a plain layer first, a torch.nn.Module, not {layer.__name__}")
    ours, theirs = drop_in.__name__, layer.__name__
    if not issubclass(drop_in, DropIn) or not issubclass(drop_in, layer):
        raise TypeError(f"{ours} is no subclass of both DropIn and {theirs}: use class {ours}(DropIn, {theirs})")
    if drop_in.__mro__.index(DropIn) > drop_in.__mro__.index(layer):
        raise TypeError(f"{ours} names DropIn after {theirs}: use class {ours}(DropIn, {theirs})")
    if drop_in.__init__ is not DropIn.__init__:
        raise TypeError(f"{ours} has an __init__, which razor_ never runs: it changes the class of a layer that exists")
    if drop_in.link is not None:
        raise ValueError(
            f"{ours} takes part in chains of layers, which know this library's own classes only: set link = None in it"
        )
    known = drop_in_of(layer)
    if known is not None:
        out = "remove() that registration first" if layer in _REGISTERED else "derive a class of your own"
        raise ValueError(f"{theirs} has a drop-in already, {known.__name__}: {out}")
    _REGISTERED[layer] = drop_in
    return Registration(layer, drop_in)


def known_layers() -> list[str]:
    """Names of all classes that have a drop-in, sorted."""
    return sorted({*(key.rpartition(".")[2] for key in DROP_INS), *(cls.__name__ for cls in _REGISTERED)})
