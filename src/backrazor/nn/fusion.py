"""Chains of modules that run as one operator: a convolution, the BatchNorm that alone consumes its output and perhaps
an activation; or a Linear and its activation.

The first drop-in computes the whole chain and the others hand their input through. That is right only where nothing
else sees the values in
between, which no module can tell by itself: ``CHAINS`` names the classes whose forward is known, by their attributes in
order. A plain Sequential is known by construction. Whether a chain runs fused is decided at every call, by the norm's
state, and both ends ask the same question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

from . import qualified_name
from .base import UNKNOWN, DropIn

_TIMM_BLOCKS = "timm.models._efficientnet_blocks"
_TIMM_RESNET = "timm.models.resnet"
_VISION_RESNET = "torchvision.models.resnet"

# (convolution, norm[, activation]) or (linear, activation) attributes. timm's norm layers carry their activation
# inside.
CHAINS: dict[str, tuple[tuple[str, ...], ...]] = {
    f"{_TIMM_BLOCKS}.ConvBnAct": (("conv", "bn1"),),
    f"{_TIMM_BLOCKS}.DepthwiseSeparableConv": (("conv_dw", "bn1"), ("conv_pw", "bn2")),
    f"{_TIMM_BLOCKS}.InvertedResidual": (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")),
    f"{_TIMM_BLOCKS}.EdgeResidual": (("conv_exp", "bn1"), ("conv_pwl", "bn2")),
    "timm.models.efficientnet.EfficientNet": (("conv_stem", "bn1"), ("conv_head", "bn2")),
    f"{_TIMM_RESNET}.BasicBlock": (("conv1", "bn1", "drop_block", "act1"), ("conv2", "bn2")),
    f"{_TIMM_RESNET}.Bottleneck": (("conv1", "bn1", "act1"), ("conv2", "bn2", "drop_block", "act2"), ("conv3", "bn3")),
    f"{_TIMM_RESNET}.ResNet": (("conv1", "bn1", "act1"),),
    f"{_VISION_RESNET}.BasicBlock": (("conv1", "bn1"), ("conv2", "bn2")),
    f"{_VISION_RESNET}.Bottleneck": (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")),
    f"{_VISION_RESNET}.ResNet": (("conv1", "bn1"),),
    "timm.layers.mlp.Mlp": (("fc1", "act"),),
    "transformers.models.bert.modeling_bert.BertIntermediate": (("dense", "intermediate_act_fn"),),
    "transformers.models.vit.modeling_vit.ViTMLP": (("fc1", "activation_fn"),),
}

_FITTING = (("conv", "norm"), ("conv", "norm", "activation"), ("linear", "activation"))


def chains(model: nn.Module) -> Iterator[tuple[nn.Module, ...]]:
    """(convolution, norm[, activation]) of every known chain in ``model``, whatever became of them."""
    for module in model.modules():
        for names in CHAINS.get(qualified_name(original_type(module)), ()):
            members = [getattr(module, name, None) for name in names]
            if all(isinstance(member, nn.Module) for member in members):
                yield tuple(member for member in members if type(member) is not nn.Identity)
        if type(module).forward is nn.Sequential.forward:
            members = list(module)
            links = [link_of(member) for member in members]
            for i in range(len(members) - 1):
                if links[i : i + 2] == ["linear", "activation"]:
                    yield tuple(members[i : i + 2])
                if links[i : i + 2] == ["conv", "norm"]:
                    yield tuple(members[i : i + 2 + (links[i + 2 : i + 3] == ["activation"])])


def link_of(module: nn.Module) -> str | None:
    """The part a module can play in a chain: "conv", "norm", "activation" or None."""
    return module.link if isinstance(module, DropIn) else None


def original_type(module: nn.Module) -> type:
    """The class of a module, or what it was before it became a drop-in."""
    return module.__dict__.get("_backrazor_original", type(module))


def link_chains(model: nn.Module) -> int:
    """Link the chains of ``model`` whose members all became drop-ins, carry no hooks, take part once and have one place
    in the model (what has two may be called from both); returns how many.

    The convolution learns its followers; each follower learns the norm, whose state decides whether it hands its input
    through.
    """
    found = list(chains(model))
    uses = Counter(member for members in found for member in members)
    uses |= Counter(module for _, module in model.named_modules(remove_duplicate=False))
    linked = 0
    for members in found:
        links = tuple(link_of(member) for member in members)
        if links not in _FITTING or any(uses[member] > 1 or _hooked(member) for member in members):
            continue
        if links[0] == "linear":
            members[0]._backrazor_followers = members[1:]
            members[1]._backrazor_norm = ()
            linked += 1
            continue
        conv, norm, *activation = members
        inner = norm.inner_activation()
        if inner is UNKNOWN or (inner is not None and (activation or _hooked(inner))):
            continue
        conv._backrazor_followers = (norm, *([inner] if inner is not None else activation))
        for follower in (norm, *activation):
            follower._backrazor_norm = (norm,)
        linked += 1
    return linked


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
