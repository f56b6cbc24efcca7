"""Chains of modules that run as one operator: a convolution, the BatchNorm that alone consumes its output and perhaps
an activation; or a Linear and its activation.

The first member, the leader, computes the whole chain and the others, its followers, hand their input through. That is
right only where nothing else sees the values in between, which no member can tell by itself; the module that calls
them, the container, can. ``CHAINS`` names the containers whose forward is known; a plain Sequential is known by
construction. A container with chains becomes a ``Linked`` one, which notes for the time of its forward that it is the
one that calls. Every call decides anew:

- a leader fuses only while its container is the innermost one that runs and, in a Sequential, it is the child whose
  turn it is, and only with the modules that stand there now, each of them a drop-in without hooks and with the forward
  of its class;
- a follower hands through only the very tensor that its leader made in this call, and computes otherwise;
- a container whose forward is another than the known one has no chains;
- a container that ends with something fused and not handed through raises.

So whatever is done to the modules after ``razor_`` (replaced, hooked, patched, sliced, shared, called alone), the
output is the dense one, or an error.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial, wraps
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..functional.transforms import is_transformed, refuse_script
from . import qualified_name
from .base import UNKNOWN, DropIn, is_patched, rebased
from .chunks import block_in_chunks, may_run_in_chunks, run_in_chunks, stem_of
from .functions import FUNCTIONS
from .known import has_patched_parts, is_globally_hooked, is_known, is_own, is_sequential, link_of

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

    __slots__ = ("_chains", "child", "container", "made")

    def __init__(self, container: nn.Module) -> None:
        self.container = container
        self.made: dict[int, Tensor] = {}
        self.child: nn.Module | None = None  # the one that a Sequential calls now
        self._chains: dict[int, Chain] | None = None

    def __enter__(self) -> _Call:
        _running.stack.append(self)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        _running.stack.pop()
        if self.made and kind is None:
            name = self.container._backrazor_linked.__name__
            raise RuntimeError(
                f"backrazor: {name} did not hand the output of a convolution or Linear to the layer that follows it in "
                f"the {name} that this library knows, so its result would be wrong: call unrazor_(model) and leave the "
                f"children of {name} dense with razor_(..., filter_fn=...). Either something else called that layer "
                f"while {name} ran, or its forward is of a version that this library does not know"
            )

    def chain_of(self, leader: nn.Module) -> Chain | None:
        """What the leader may run beside its own work, or None."""
        if self.child is not None and self.child is not leader:  # somebody inside that child calls
            return None
        if self._chains is None:
            self._chains = dict(_chains(self.container))
        chain = self._chains.get(id(leader))
        # nothing may wait that an earlier call of the same leader made
        waits = chain is not None and any(id(follower) in self.made for follower in chain.followers)
        return None if waits else chain


class Linked(nn.Module):
    """Mixin of the containers that hold chains."""

    _backrazor_linked: ClassVar[type[nn.Module]]  # the class of the container before

    __prepare_scriptable__ = refuse_script

    def __reduce_ex__(self, protocol: int):
        original = self._backrazor_linked
        own = original.__reduce__ is not object.__reduce__ or original.__reduce_ex__ is not object.__reduce_ex__
        if own or type(self) is not linked(original):  # or derived from it since: that class's own affair
            return super().__reduce_ex__(protocol)
        return _restore, (original,), self.__getstate__()


def _restore(original: type[nn.Module]) -> nn.Module:
    cls = linked(original)
    return cls.__new__(cls)


def unlink(module: Linked) -> None:
    """Turn a container back into what it was."""
    original = module._backrazor_linked
    module.__class__ = rebased(type(module), linked(original), original)


def linked(original: type[nn.Module]) -> type[Linked]:
    """The class of a container whose class was ``original``: one for each, which lives as long as it is used."""
    for cls in original.__subclasses__():
        if vars(cls).get("_backrazor_linked") is original:
            return cls

    def called(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Call(self) as call:
            if is_sequential(original):
                return _in_turn(call, *args, **kwargs)
            return original.forward(self, *args, **kwargs)

    @wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return original.forward(self, *args, **kwargs)
        if len(args) == 1 and not kwargs:
            if hands_through(self, args[0]):
                return args[0]
            out = run_ahead(self, args[0])
            if out is None:
                out = block_in_chunks(partial(called, self), self, args[0])
            if out is not None:
                return out
        return called(self, *args, **kwargs)

    members = {"__module__": __name__, "__doc__": original.__doc__, "forward": forward, "_backrazor_linked": original}
    return type(f"Razor{original.__name__}", (Linked, original), members)


def _in_turn(call: _Call, input: Any) -> Any:
    """The forward of a Sequential."""
    waiting = list(call.container._modules.values())
    while waiting:
        count = 0
        if _maker_of(waiting[0], input) is None:
            count, input = run_in_chunks(partial(_one_by_one, call), waiting, input)
        if not count:
            count, input = 1, _one_by_one(call, waiting[:1], input)
        del waiting[:count]
    return input


def _one_by_one(call: _Call, modules: list[nn.Module], input: Any) -> Any:
    """What some modules of a Sequential make of ``input``, one after the other."""
    for module in modules:
        call.child = module
        input = module(input)
    return input


def chain_of(leader: nn.Module, x: object) -> Chain | None:
    """What ``leader`` may run beside its own work on x in this call, or None."""
    if torch.compiler.is_dynamo_compiling() or not _running.stack or is_transformed():
        return None
    if not isinstance(x, Tensor) or x.is_nested:
        return None
    return _running.stack[-1].chain_of(leader)


def hands_through(follower: nn.Module, x: Tensor) -> bool:
    """Whether x is what the leader of ``follower``'s chain made in this call, its work done. Counts once."""
    if torch.compiler.is_dynamo_compiling():
        return False
    call = _maker_of(follower, x)
    if call is None:
        return False
    del call.made[id(follower)]
    return True


def _maker_of(follower: nn.Module, x: object) -> _Call | None:
    """The call in which x was made that ``follower`` is to hand through, or None."""
    for call in reversed(_running.stack):
        if call.made and call.made.get(id(follower)) is x:
            return call
    return None


def run_ahead(leader: nn.Module, x: object) -> Tensor | None:
    """What ``leader``, the first child of a network whose forward is known, and some of the layers behind it make of x
    in chunks together; these then hand it through. None where each is to run when it is called."""
    if torch.compiler.is_dynamo_compiling() or not _running.stack or not isinstance(x, Tensor):
        return None
    call = _running.stack[-1]
    if call.made or leader not in call.container._modules.values():
        return None
    layers = stem_of(call.container)
    if not layers or layers[0] is not leader:
        return None
    count = 1
    while count < len(layers) and _can_hand_through(layers[count]):
        count += 1
    with FUNCTIONS.resumed():
        count, out = run_in_chunks(_each, layers[:count], x)
    if not count:
        return None
    call.made.update({id(layer): out for layer in layers[1:count] if isinstance(layer, (DropIn, Linked))})
    return out


def _can_hand_through(module: nn.Module) -> bool:
    """Whether a call of the module on what was made before it is one that makes nothing of it."""
    if type(module) is nn.Identity or isinstance(module, Linked):
        return True
    return isinstance(module, DropIn) and (module.link in ("norm", "activation") or module.may_hand_through)


def _each(modules: list[nn.Module], input: Tensor) -> Tensor:
    for module in modules:
        input = module(input)
    return input


def link_chains(model: nn.Module) -> int:
    """Make containers of ``model`` that hold chains ``Linked`` ones; returns how many chains run as one operator as
    the modules stand now. A class that cannot be derived from is left as it is."""
    count = 0
    for module in list(model.modules()):
        if isinstance(module, (DropIn, Linked)):
            continue
        found = sum(1 for _ in _chains(module))
        if not found and not may_run_in_chunks(module):
            continue
        try:
            cls = linked(type(module))
        except TypeError:  # its __init_subclass__ asks for more
            continue
        module.__class__ = cls
        count += found
    return count


def _chains(container: nn.Module) -> Iterator[tuple[int, Chain]]:
    """(id of the leader, chain) of every chain of ``container`` as its children stand now."""
    if is_patched(container) or is_globally_hooked():
        return
    for members in _sequences(container):
        chain = _chain(members)
        if chain is not None:
            yield id(members[0]), chain


def _sequences(container: nn.Module) -> Iterator[list[nn.Module]]:
    """The members of each chain that the class of ``container`` promises, as its children stand now."""
    cls = getattr(container, "_backrazor_linked", type(container))
    children = container._modules
    known = CHAINS.get(qualified_name(cls))
    if known is not None and is_known(cls) and not has_patched_parts(container):
        places = _places(container)
        for names in known:
            members = [children.get(name) for name in names]
            if any(member is None for member in members) or places[id(members[0])] > 1:
                continue  # one module in two places: it cannot tell which of them calls
            yield [member for member in members if type(member) is not nn.Identity or not is_own(member)]
    if is_sequential(cls):
        members = list(children.values())
        links = [link_of(member) for member in members]
        times = Counter(map(id, members))
        for i, link in enumerate(links):
            if link in ("linear", "conv") and times[id(members[i])] == 1:
                length = 3 if link == "conv" and links[i + 2 : i + 3] == ["activation"] else 2
                yield members[i : i + length]


def _places(container: nn.Module) -> Counter[int]:
    """How many places below ``container`` each module has, by id."""
    places: Counter[int] = Counter()
    seen: set[int] = set()
    waiting = [container]
    while waiting:
        children = [child for child in waiting.pop()._modules.values() if child is not None]
        places.update(map(id, children))
        waiting += [child for child in children if id(child) not in seen and child._modules]
        seen.update(map(id, children))
    return places


def _chain(members: list[nn.Module]) -> Chain | None:
    """The chain that these modules are, or None where one of them has to run by itself."""
    if tuple(map(link_of, members)) not in _FITTING or not all(map(is_own, members)):
        return None
    _, *followers = members
    if members[0].link == "linear":
        return Chain(None, followers[0], tuple(followers))
    norm, *activation = followers
    inner = norm.inner_activation()
    if not all(map(is_own, norm.children())):
        return None
    if inner is None:
        return Chain(norm, activation[0] if activation else None, tuple(followers))
    return None if inner is UNKNOWN or activation else Chain(norm, inner, (norm,))
