"""Whether a module runs what this library knows of it, and nothing of anybody else."""

from __future__ import annotations

import sys

from torch import nn
from torch.nn.modules import module as torch_module

from ..hooks import is_passive
from .base import DropIn, class_given_to, has_its_own_forward, is_patched

_CALLS = (nn.Module.__call__, DropIn.__call__)
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
_PARTS_OF_FORWARD = ("forward_features", "_forward_impl")
# Forwards of other libraries that call all children in their order.
_IN_TURN = ("ofa.utils.layers.My2DLayer.forward",)


def is_sequential(cls: type[nn.Module]) -> bool:
    """Whether a class calls its children one after the other."""
    if cls.forward is nn.Sequential.forward:
        return cls.__iter__ is nn.Sequential.__iter__
    return f"{cls.forward.__module__}.{cls.forward.__qualname__}" in _IN_TURN


def is_known(cls: type[nn.Module]) -> bool:
    """Whether the forward of a class that is known by name, and the parts of it, are those in its library's file."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    parts = [getattr(cls, name) for name in _PARTS_OF_FORWARD if hasattr(cls, name)]
    files = {getattr(getattr(part, "__code__", None), "co_filename", None) for part in (cls.forward, *parts)}
    return has_its_own_forward(cls) and files == {file}


def has_patched_parts(module: nn.Module) -> bool:
    """Whether somebody has replaced a part of the module's own forward."""
    return any(name in module.__dict__ for name in _PARTS_OF_FORWARD)


def link_of(module: nn.Module) -> str | None:
    """The part a module can play in a chain: "linear", "conv", "norm", "activation" or None."""
    return module.link if isinstance(module, DropIn) else None


def is_own(module: nn.Module) -> bool:
    """Whether calling the module runs the forward of the class that ``razor_`` gave it and nothing of anybody else."""
    cls = type(module)
    given = class_given_to(module) if isinstance(module, DropIn) else cls
    return cls.forward is given.forward and cls.__call__ in _CALLS and is_untouched(module)


def is_untouched(module: nn.Module) -> bool:
    """Whether nobody has replaced or compiled the module's forward, or hooked to the module to see or change it."""
    if is_patched(module) or module._compiled_call_impl is not None:
        return False
    if module._backward_hooks or module._backward_pre_hooks:
        return False
    if not module._forward_hooks and not module._forward_pre_hooks:
        return True
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return all(map(is_passive, hooks))


def class_before(module: nn.Module) -> type[nn.Module]:
    """The class of a container before ``razor_`` linked it and put it under the net."""
    cls = type(module)
    for name in ("_backrazor_netted", "_backrazor_linked"):
        cls = vars(cls).get(name, cls)
    return cls


def is_globally_hooked() -> bool:
    """Whether hooks of all modules see what each of them is given and gives."""
    return any(getattr(torch_module, name) for name in _GLOBAL_HOOKS)
