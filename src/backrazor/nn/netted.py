"""Modules under the net: while one of them runs, functions that it calls by themselves are met by the razored
operators, and what autograd keeps beside those is kept small (see ``functional/rest.py``).

A netted module's class is changed as a drop-in's is, but keeps its name, and only its ``__call__`` is another. The
outermost netted module that runs opens the net. One inside opens it anew where its own settings differ, or where
activation checkpointing or another holder of hooks came between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..functional.rest import Net, running
from ..functional.transforms import refuse_script
from .base import NET, LayerRules, Status, rebased, why_not_rebased
from .functions import FUNCTIONS
from .fusion import Linked, linked


@dataclass(frozen=True)
class NetRules:
    """What holds while a module runs. ``packs``: whether the rest is kept in 8 bits. ``rules``: those that functions
    get which the module calls by itself; None where they are left alone. ``windowed``: index 0 counts no samples."""

    packs: bool
    rules: LayerRules | None
    windowed: bool = False


class Place:
    """A module's place in the net: its rules and its status bits."""

    def __init__(self, net: NetRules) -> None:
        self.net, self.status = net, Status()

    def opened(self, module: nn.Module) -> Net:
        """The net of one call of ``module``, whose parameters and buffers live anyway."""
        return Net(self.net.packs, self, self.status.on, lambda: (*module.parameters(), *module.buffers()))

    def flag(self, x: Tensor) -> Tensor:
        """The status bits for work on x."""
        return self.status.on(x.device)


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


def netted(original: type[nn.Module]) -> type[Netted]:
    """The class of a netted module whose class was ``original``: one for each, which lives as long as it is used.

    Raises:
        TypeError: the class cannot be derived from.
    """
    for cls in original.__subclasses__():
        if vars(cls).get("_backrazor_netted") is original:
            return cls

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        place = None if torch.compiler.is_compiling() else self.__dict__.get(NET)
        if place is None or not torch.is_grad_enabled():
            return original.__call__(self, *args, **kwargs)
        net = running()
        if net is not None and net.settings.net == place.net:
            return original.__call__(self, *args, **kwargs)
        with place.opened(self), FUNCTIONS.opened():
            return original.__call__(self, *args, **kwargs)

    members = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__call__": call,
        "_backrazor_netted": original,
    }
    return type(original)(original.__name__, (Netted, original), members)


def cast_net(module: nn.Module, net: NetRules) -> bool:
    """Put ``module`` under the net; returns whether its class allows it."""
    try:
        cls = netted(type(module))
    except TypeError:  # its __init_subclass__ asks for more
        return False
    module.__dict__[NET] = Place(net)
    module.__class__ = cls
    return True


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
