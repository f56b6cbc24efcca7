"""Chains of modules that run as one operator: a convolution, the BatchNorm that alone consumes its output and perhaps
an activation; or a Linear and its activation.

The first member, the leader, computes the whole chain and the others, its followers, hand their input through. That is
right only where nothing else sees the values in between, which no member can tell by itself; the module that calls
them, the container, can. ``CHAINS`` names the containers whose forward is known; a plain Sequential is known by
construction. A container with chains becomes a ``Linked`` one, which notes for the time of its forward that it is the
one that calls. Every call decides anew:

- a leader fuses only while its container is the innermost one that runs, and only with the modules that stand there
  now, each of them a drop-in without hooks and with the forward of its class;
- a follower hands through only the very tensor that its leader made in this call, and computes otherwise;
- a container that ends with something fused and not handed through raises.

So whatever is done to the modules after ``razor_`` (replaced, hooked, patched, sliced, shared, called alone), the
output is the dense one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..functional.transforms import is_transformed, refuse_script
from ..hooks import is_passive
from . import qualified_name
from .base import UNKNOWN, DropIn, class_given_to, is_patched, rebased

_TIMM_BLOCKS = "timm.models._efficientnet_blocks"
_TIMM_RESNET = "timm.models.resnet"
_VISION_RESNET = "torchvision.models.resnet"

# Attribute names: (convolution, norm[, activation]) or (linear, activation). timm's norm layers hold their activation.
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
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


class Chain(NamedTuple):
    """What follows a leader: the norm and the activation that it may run, and the modules that then hand through."""

    norm: nn.Module | None
    activation: nn.Module | None
    followers: tuple[nn.Module, ...]

    def done(self, out: Tensor) -> Tensor:
        """Note that ``out`` is the output of the whole chain; returns it."""
        _running.stack[-1].made.update({id(follower): out for follower in self.followers})
        return out


class _Running(threading.local):
    """The containers that run in this thread, innermost last."""

    def __init__(self) -> None:
        self.stack: list[_Call] = []


_running = _Running()


class _Call:
    """One call of a container. ``made``: what its followers are to hand through, by their id."""

    __slots__ = ("container", "made")

    def __init__(self, container: nn.Module) -> None:
        self.container = container
        self.made: dict[int, Tensor] = {}

    def __enter__(self) -> None:
        _running.stack.append(self)

    def __exit__(self, kind: type | None, *_: object) -> None:
        _running.stack.pop()
        if self.made and kind is None:
            name = self.container._backrazor_linked.__name__
            raise RuntimeError(
                f"backrazor: {name} did not hand the output of a convolution or Linear to the layer that follows it in "
                f"the {name} that this library knows, so its result would be wrong: call unrazor_(model), leave the "
                f"children of {name} dense with razor_(..., filter_fn=...), and report the version of the library that "
                "it comes from"
            )


class Linked(nn.Module):
    """Mixin of the containers that hold chains."""

    __prepare_scriptable__ = refuse_script

    def __reduce_ex__(self, protocol: Any) -> str | tuple[Any, ...]:
        if type(self) is not linked(self._backrazor_linked):  # derived from it since: that class's own affair
            return super().__reduce_ex__(protocol)
        return _restore, (self._backrazor_linked,), self.__dict__


def _restore(original: type[nn.Module]) -> nn.Module:
    cls = linked(original)
    return cls.__new__(cls)


def unlink(module: Linked) -> None:
    """Turn a container back into what it was."""
    original = module._backrazor_linked
    module.__class__ = rebased(type(module), linked(original), original)


@cache
def linked(original: type[nn.Module]) -> type[Linked]:
    """The class of a container whose class was ``original``."""

    @wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original.forward(self, *args, **kwargs)
        with _Call(self):
            return original.forward(self, *args, **kwargs)

    members = {"__module__": __name__, "__doc__": original.__doc__, "forward": forward, "_backrazor_linked": original}
    return type(f"Razor{original.__name__}", (Linked, original), members)


def chain_of(leader: nn.Module, x: object) -> Chain | None:
    """What ``leader`` may run beside its own work on x in this call, or None."""
    if not isinstance(x, Tensor):
        return None
    if torch.compiler.is_compiling() or not _running.stack or is_transformed():
        return None
    call = _running.stack[-1]
    for members in _sequences(call.container):
        if members[0] is leader:
            waiting = any(id(member) in call.made for member in members)  # for what an earlier call of it made
            return None if waiting else _chain(members)
    return None


def hands_through(follower: nn.Module, x: Tensor) -> bool:
    """Whether x is what the leader of ``follower``'s chain made in this call, its work done. Counts once."""
    if torch.compiler.is_compiling() or not _running.stack:
        return False
    made = _running.stack[-1].made
    if made.get(id(follower)) is not x:
        return False
    del made[id(follower)]
    return True


def link_chains(model: nn.Module) -> int:
    """Make containers of ``model`` that hold chains ``Linked`` ones; returns how many chains run as one operator as
    the modules stand now."""
    count = 0
    for module in list(model.modules()):
        if isinstance(module, (DropIn, Linked)) or is_patched(module):
            continue
        found = sum(_chain(members) is not None for members in _sequences(module))
        if found:
            module.__class__ = linked(type(module))
            count += found
    return count


def _sequences(container: nn.Module) -> Iterator[list[nn.Module]]:
    """The members of each chain that the class of ``container`` promises, as its children stand now. None where the
    class or the forward is not the known one."""
    if is_patched(container):
        return
    cls = getattr(container, "_backrazor_linked", type(container))
    children = container._modules
    leaders: set[int] = set()
    for names in CHAINS.get(qualified_name(cls), ()):
        members = [children.get(name) for name in names]
        if any(member is None for member in members) or id(members[0]) in leaders:
            continue  # one module in two places: it cannot tell which of them calls
        leaders.add(id(members[0]))
        yield [member for member in members if type(member) is not nn.Identity or not _is_own(member)]
    if cls.forward is nn.Sequential.forward:
        members = list(children.values())
        links = [link_of(member) for member in members]
        for i, link in enumerate(links):
            if link in ("linear", "conv") and sum(member is members[i] for member in members) == 1:
                length = 3 if link == "conv" and links[i + 2 : i + 3] == ["activation"] else 2
                yield members[i : i + length]


def _chain(members: list[nn.Module]) -> Chain | None:
    """The chain that these modules are, or None where one of them has to run by itself."""
    if tuple(link_of(member) for member in members) not in _FITTING:
        return None
    if not all(map(_is_own, members)) or _globally_hooked():
        return None
    _, *followers = members
    if link_of(members[0]) == "linear":
        return Chain(None, followers[0], tuple(followers))
    norm, *activation = followers
    inner = norm.inner_activation()
    if inner is None:
        return Chain(norm, activation[0] if activation else None, tuple(followers))
    if inner is UNKNOWN or activation or not _is_own(inner):
        return None
    return Chain(norm, inner, (norm,))


def link_of(module: nn.Module) -> str | None:
    """The part a module can play in a chain: "linear", "conv", "norm", "activation" or None."""
    return module.link if isinstance(module, DropIn) else None


def _is_own(module: nn.Module) -> bool:
    """Whether calling the module runs the forward of the class that ``razor_`` gave it and nobody else's hook."""
    given = class_given_to(module) if isinstance(module, DropIn) else type(module)
    if is_patched(module) or type(module).forward is not given.forward:
        return False
    if module._backward_hooks or module._backward_pre_hooks:
        return False
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return all(map(is_passive, hooks))


def _globally_hooked() -> bool:
    return any(getattr(torch_module, name) for name in _GLOBAL_HOOKS)
