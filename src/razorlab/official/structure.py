"""Recognising the blocks of published networks by structure or class name, without importing their packages."""

from __future__ import annotations

from torch import nn

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
_SMOOTH_ACTIVATIONS = (nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid)
# By name: libraries define their own classes for the same functions.
_UNDEFINED_NAMES = {
    "SiLU",
    "Swish",
    "GELU",
    "GELUTanh",
    "QuickGELU",
    "Mish",
    "ELU",
    "SELU",
    "CELU",
    "MultiheadAttention",
}
_SMOOTH_NAMES = ("Hswish", "Hsigmoid")  # once-for-all's own classes


def is_attention(module: nn.Module) -> bool:
    """timm's attention layout: one Linear for q, k and v, one for the output."""
    linears = (getattr(module, "qkv", None), getattr(module, "proj", None))
    return all(isinstance(linear, nn.Linear) for linear in linears) and hasattr(module, "num_heads")


def is_mlp(module: nn.Module) -> bool:
    linears = (getattr(module, "fc1", None), getattr(module, "fc2", None))
    return all(isinstance(linear, nn.Linear) for linear in linears)


def is_transformer_block(module: nn.Module) -> bool:
    children = list(module.children())
    return any(is_attention(child) for child in children) and any(is_mlp(child) for child in children)


def adds_its_input(module: nn.Module) -> bool:
    """Whether the formula holds this block's input: inverted residuals with a shortcut, every BasicBlock or Bottleneck.

    Classes go by name, so that torchvision, timm and once-for-all are recognised without being imported.
    """
    names = {base.__name__ for base in type(module).__mro__}
    if names & {"BasicBlock", "Bottleneck"}:
        return True
    if "ResidualBlock" in names:
        return getattr(module, "shortcut", None) is not None
    if names & {"InvertedResidual", "DepthwiseSeparableConv"}:
        return bool(getattr(module, "use_res_connect", False) or getattr(module, "has_skip", False))
    return False


def is_smooth_activation(module: nn.Module) -> bool:
    return isinstance(module, _SMOOTH_ACTIVATIONS) or type(module).__name__ in _SMOOTH_NAMES


def check_defined(model: nn.Module) -> None:
    """Refuse razored models, and layers outside a transformer block that the formula has no line for."""
    for name, module in model.named_modules():
        if type(module).__module__.split(".")[0] == "backrazor":
            raise ValueError(
                f"the official formula takes a plain network, but {name or 'the model'} is razored: call unrazor_ first"
            )
    in_blocks = {m for block in model.modules() if is_transformer_block(block) for m in block.modules()}
    for name, module in model.named_modules():
        if module not in in_blocks and _is_undefined(module):
            raise ValueError(
                f"the official formula is not defined for {type(module).__name__} ({name}): use br.memory.predict"
            )


def _is_undefined(module: nn.Module) -> bool:
    if is_attention(module) or not _UNDEFINED_NAMES.isdisjoint(base.__name__ for base in type(module).__mro__):
        return True
    is_leaf = next(module.children(), None) is None
    has_parameters = next(module.parameters(recurse=False), None) is not None
    return is_leaf and has_parameters and not isinstance(module, (nn.Conv2d, nn.Linear, *NORMS))
