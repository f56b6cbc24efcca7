"""Modules under the net: while one of them runs, functions that it calls by themselves are met by the razored
operators, and what autograd keeps beside those is kept small (see ``functional/rest.py``).

A netted module's class is changed as a drop-in's is, but keeps its name, and only its ``__call__`` is another. The
outermost netted module that runs opens the net. One inside opens it anew where its own settings differ, or where
activation checkpointing or another holder of hooks came between.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._subclasses.functional_tensor import FunctionalTensor

from ..functional.rest import Net, TracedNet, running
from ..functional.transforms import one_node, refuse_script
from .base import NET, STATUS, DropIn, LayerRules, Status, rebased, why_not_rebased
from .functions import FUNCTIONS
from .fusion import Linked, linked


@dataclass(frozen=True)
class NetRules:
    """What holds while a module runs. ``packs``: whether the rest is kept in 8 bits. ``rules``: those that functions
    get which the module calls by itself; None where they are left alone."""

    packs: bool
    rules: LayerRules | None


class Place:
    """A module's place in the net: its rules and its status bits."""

    def __init__(self, net: NetRules, status: Status | None = None) -> None:
        self.net, self.status = net, Status() if status is None else status
        self.owned: dict[str, NetRules] = {}  # the same as ``_owners``, by names, as ``razor_`` found it

    def opened(self, module: nn.Module) -> Net:
        """The net of one call of ``module``, whose parameters and buffers live anyway."""

        def resident() -> tuple[Tensor, ...]:
            return *module.parameters(), *module.buffers()

        return Net(self.net.packs, self, self.status.on, resident, lambda: self._owners(module))

    def _owners(self, module: nn.Module) -> dict[int, Place]:
        """The places of the parts of ``module`` that have rules of their own, by the ids of their parameters. Nothing
        of a parameter that parts with different rules share."""
        owners: dict[int, Place | None] = {}
        for part in module.modules():
            place = part.__dict__.get(NET)
            if isinstance(part, DropIn):
                place = Place(NetRules(self.net.packs, part.razor), part.__dict__[STATUS])
            if place is None:
                continue
            for parameter in part._parameters.values():
                known = owners.setdefault(id(parameter), place)
                if known is not None and known.net != place.net:
                    owners[id(parameter)] = None
        return {key: place for key, place in owners.items() if place is not None}

    def note_owned(self, module: nn.Module) -> None:
        """Note by names which parameters of ``module`` belong to parts with other rules, for a compiler."""
        owners = self._owners(module)
        rules = ((name, owners[id(p)].net) for name, p in module.named_parameters() if id(p) in owners)
        self.owned = {name: net for name, net in rules if net != self.net}

    def flag(self, x: Tensor) -> Tensor:
        """The status bits for work on x."""
        return self.status.on(x.device)


class _TracedPlace:
    """A module's place in the net of a graph that is being traced, or that of a part of it. ``flags``: the module's
    status bits there, one per device."""

    def __init__(self, net: NetRules, flags: tuple[Tensor, ...]) -> None:
        self.net, self._flags = net, flags

    def on(self, device: torch.device) -> Tensor:
        """The status bits for work on a device."""
        for flag in self._flags:
            if flag.device == device:
                return flag
        return torch.zeros(1, dtype=torch.int32, device=device)

    def flag(self, x: Tensor) -> Tensor:
        """The status bits for work on x."""
        return self.on(x.device)


class _Traced(threading.local):
    """What is open in the graph that this thread traces, innermost last; None where nothing had to be opened."""

    def __init__(self) -> None:
        self.open: list[ExitStack | None] = []


_traced = _Traced()


@one_node
def _open(
    net: NetRules,
    flags: tuple[Tensor, ...],
    parameters: tuple[Tensor, ...],
    owned: tuple[NetRules | None, ...],
    buffers: tuple[Tensor, ...],
) -> None:
    """A node that opens the net for the nodes that follow, while what they do is recorded. Where they only run, or give
    shapes, it does nothing. ``owned``: the rules of the parts that own ``parameters``, where these are others."""
    if not isinstance(flags[0], FunctionalTensor):
        return
    outer, context = running(), None
    if outer is None or outer.settings.net != net:
        place = _TracedPlace(net, flags)
        context = ExitStack()
        owners = [None if rules is None else _TracedPlace(rules, flags) for rules in owned]
        context.enter_context(TracedNet(net.packs, place, place.on, parameters, owners, buffers))
        context.enter_context(FUNCTIONS.opened())
    _traced.open.append(context)


@one_node
def _close(flags: tuple[Tensor, ...]) -> None:
    """The node that closes what ``_open`` has opened."""
    if isinstance(flags[0], FunctionalTensor):
        context = _traced.open.pop()
        if context is not None:
            context.close()


@contextmanager
def _in_graph(module: nn.Module, place: Place) -> Iterator[None]:
    """The net of one call of ``module`` as nodes of the graph that Dynamo writes."""
    flags = tuple(place.status.flags)
    if not flags:
        yield
        return
    named = list(module.named_parameters())
    owned = tuple([place.owned.get(name) for name, _ in named])
    _open(place.net, flags, tuple([p for _, p in named]), owned, tuple(module.buffers()))
    try:
        yield
    finally:
        _close(flags)


class Netted(nn.Module):
    """Mixin of the modules under the net."""

    _backrazor_netted: ClassVar[type[nn.Module]]  # the class of the module before

    __prepare_scriptable__ = refuse_script

    def __reduce_ex__(self, protocol: Any) -> Any:
        original = self._backrazor_netted
        has_chains = issubclass(original, Linked)
        plain = original._backrazor_linked if has_chains else original
        function, arguments, *state = plain.__reduce_ex__(self, protocol)
        if type(self) is not netted(original):  # derived from it since: that class's own affair
            return function, arguments, *state
        arguments = tuple(plain if argument is type(self) else argument for argument in arguments)
        return _restore, (function, arguments, has_chains), *state


def _restore(function: Callable[..., nn.Module], arguments: tuple, has_chains: bool) -> nn.Module:
    module = function(*arguments)
    module.__class__ = netted(linked(type(module)) if has_chains else type(module))
    return module


def _under_net(function: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``function(module, *args, **kwargs)``, a call of the module, with its net open."""
    place = module.__dict__.get(NET)
    if place is None or not torch.is_grad_enabled():
        return function(module, *args, **kwargs)
    if torch.compiler.is_dynamo_compiling():
        with _in_graph(module, place):
            return function(module, *args, **kwargs)
    net = running()
    same = net is not None and net.settings.net == place.net
    if same or get_eval_frame_callback():  # a module that takes several graphs, each of which has nets of its own
        return function(module, *args, **kwargs)
    with place.opened(module), FUNCTIONS.opened():
        return function(module, *args, **kwargs)


def netted(original: type[nn.Module]) -> type[Netted]:
    """The class of a netted module whose class was ``original``: one for each, which lives as long as it is used.

    Raises:
        TypeError: the class cannot be derived from.
    """
    for cls in original.__subclasses__():
        if vars(cls).get("_backrazor_netted") is original:
            return cls

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._compiled_call_impl is not None:  # which opens the net itself
            return original.__call__(self, *args, **kwargs)
        return _under_net(original.__call__, self, *args, **kwargs)

    def compile(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        def compiled(*args: Any, **kwargs: Any) -> Any:
            return _under_net(original._call_impl, self, *args, **kwargs)

        self._compiled_call_impl = torch.compile(compiled, *args, **kwargs)

    def apply(self: nn.Module, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        if NET in self.__dict__:
            self.__dict__[NET].status.follow(fn)
        return original._apply(self, fn, *args, **kwargs)

    members = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__call__": call,
        "_apply": apply,
        "compile": compile,
        "_backrazor_netted": original,
    }
    return type(original)(original.__name__, (Netted, original), members)


def cast_net(module: nn.Module, net: NetRules, devices: Iterable[torch.device]) -> bool:
    """Put ``module``, of a model on ``devices``, under the net; returns whether its class allows it."""
    try:
        cls = netted(type(module))
    except TypeError:  # its __init_subclass__ asks for more
        return False
    place = module.__dict__[NET] = Place(net)
    place.status.prepare(module, devices)
    module.__class__ = cls
    return True


def note_owned(model: nn.Module) -> None:
    """To be called when all of ``model`` is under its nets."""
    for module in model.modules():
        if NET in module.__dict__:
            module.__dict__[NET].note_owned(module)


def why_not_taken(module: Netted) -> str | None:
    """Why the module cannot be turned back, in words; None where it can."""
    return why_not_rebased(module, netted(module._backrazor_netted))


def take_net(module: Netted) -> None:
    """Turn a module back into what it was."""
    original = module._backrazor_netted
    module.__class__ = rebased(type(module), netted(original), original)
    module.__dict__.pop(NET, None)


def status_of_net(module: nn.Module) -> list[Tensor]:
    """The status bits of what a module under the net has kept by itself."""
    place = module.__dict__.get(NET)
    return [] if place is None else place.status.flags


def packs_the_rest(module: nn.Module) -> bool:
    """Whether what autograd keeps while the module runs is kept in 8 bits."""
    place = module.__dict__.get(NET)
    return place is not None and place.net.packs
