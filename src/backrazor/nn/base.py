"""What every drop-in has: the resolved rules of its layer, a flag for bad numbers, and the class it came from.

A drop-in is a subclass of the layer it replaces, put in place by changing the object's class. Parameters, buffers,
hooks, mode, names and every reference to the module stay as they are. The way back is the same assignment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..codecs import Pruned
from ..codecs.normalised import NormCodec
from ..functional.attention import AttentionCodec
from ..functional.transforms import is_wrapped, refuse_script, refuse_tracing
from .functions import FUNCTIONS

UNKNOWN = object()  # an activation inside a norm layer that is no drop-in

ORIGINAL, _GIVEN, STATUS = "_backrazor_original", "_backrazor_given", "_backrazor_status"
NET = "_backrazor_net"
_OWN = (ORIGINAL, _GIVEN, STATUS, NET, "razor")  # what razor_ puts into the __dict__ of a module


@dataclass(frozen=True, slots=True)
class LayerRules:
    """The configuration as one layer sees it.

    Attributes:
        pruned: what the operators of ``backrazor.functional`` take to pack an input: sparsity, values and index.
        norm: the same for the input of a normalisation.
        activation: what a smooth activation keeps: "dense", "float16", "int8", "int4", "int2" or "auto".
        attention: what attention keeps of q, k, its softmax and v.
        gate: what a gated product keeps of its factors: "rest", "int8" or "int4".
    """

    pruned: Pruned
    norm: NormCodec
    activation: str
    attention: AttentionCodec
    gate: str


def devices_of(module: nn.Module) -> set[torch.device]:
    """The devices of a module's parameters and buffers."""
    return {t.device for t in (*module.parameters(), *module.buffers())}


class Status:
    """The status bits that a layer's packing sets: one int32 per device, made where it is first needed.

    It is no buffer: it is not part of the model's state, is not averaged, moved or initialised with it, and a copy of
    the layer starts with one of its own.
    """

    def __init__(self) -> None:
        self._flags: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The flag, int32 (1,), for work on ``device``."""
        flag = self._flags.get(device)
        if flag is None and torch.compiler.is_dynamo_compiling():  # nobody would find what it writes there
            return torch.zeros(1, dtype=torch.int32, device=device)
        if flag is None:
            with torch.inference_mode(False):  # it is written to in training, too
                flag = torch.zeros(1, dtype=torch.int32, device=device)
            # shapes without data, and tensors of a transform, do not outlive the call
            lasting = type(flag) is Tensor and device.type != "meta"
            if lasting and not is_wrapped(flag):
                self._flags[device] = flag
        return flag

    @property
    def flags(self) -> list[Tensor]:
        """The flags that exist."""
        return list(self._flags.values())

    def prepare(self, module: nn.Module, devices: Iterable[torch.device]) -> None:
        """Make the flags now where ``module`` is going to need them, so that a compiler that traces it finds them:
        where its parameters are, on ``devices`` if it has none."""
        for device in devices_of(module) or devices:
            self.on(device)

    def follow(self, move: Callable[[Tensor], Tensor]) -> None:
        """Take the flags to where ``move`` puts tensors, which it is going to do with the module's. None stays behind:
        whoever reads them all would wait for a copy."""
        for device, flag in list(self._flags.items()):
            moved = move(torch.zeros_like(flag))
            if not isinstance(moved, Tensor) or moved.device == device:
                continue
            there = self.on(moved.device)
            if "meta" not in (device.type, moved.device.type):
                there.bitwise_or_(flag.to(moved.device))
            del self._flags[device]

    def __deepcopy__(self, memo: dict) -> Status:
        copied = Status()
        for device in self._flags:
            copied.on(device)
        return copied

    def __reduce__(self) -> tuple:
        return Status, ()


class DropIn(nn.Module):
    """Base of the drop-ins: ``class RazorMyLayer(DropIn, MyLayer)``, with ``DropIn`` first.

    A drop-in overrides ``forward``, or a method that the layer's forward calls. The new one computes what the layer
    computes, to the bit, through the operators of ``backrazor.functional``, which pack what backward needs. They take
    the layer's rules, ``self.razor``, and its flag, ``self.flag_for(x)``::

        def forward(self, x):
            return functional.linear(x, self.weight, self.bias, self.razor.pruned, self.flag_for(x))

    It may also override ``refusal``, ``keeps`` and ``rules_used``, and the class attributes below. It has no
    ``__init__`` and no parameters or buffers of its own, since ``razor_`` only changes the class of a module that
    exists. ``backrazor.register`` makes a drop-in known.

    Attributes:
        razor: the layer's rules.
        packs: whether an operator in it takes a flag. False for a layer that keeps bits or a shape only.
        prunes: whether it packs its first argument, sample by sample.
        link: its part in a chain that runs as one operator (see fusion.py). None for every class outside this library.
        may_hand_through: whether, beside norms and activations, it returns its input where its work is done.
    """

    razor: LayerRules
    packs: ClassVar[bool] = True
    prunes: ClassVar[bool] = False
    link: ClassVar[str | None] = None
    may_hand_through: ClassVar[bool] = False

    def __init__(self, *args: object, **kwargs: object) -> None:
        """A layer made by the class of another one, ``type(layer)(...)``, is a plain one: it has no rules.

        Raises:
            TypeError: the class is derived from a drop-in's.
        """
        from . import drop_in_of  # the table of drop-ins stands above this module

        super().__init__(*args, **kwargs)
        original = next(cls for cls in type(self).__mro__ if not issubclass(cls, DropIn))
        if drop_in_of(original) is not type(self):
            raise TypeError(
                f"{type(self).__name__} is derived from a drop-in of backrazor, which has no rules until razor_ gives "
                f"it some: derive it from {original.__name__}"
            )
        self.__class__ = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The call of every module. Where nothing is called by way of the layer, functions need not be watched."""
        if self._modules or torch.compiler.is_dynamo_compiling():
            return super().__call__(*args, **kwargs)
        return FUNCTIONS.paused(super().__call__, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """What moves a module: there have to be status bits where it is."""
        self.__dict__[STATUS].follow(fn)
        return super()._apply(fn, *args, **kwargs)

    @classmethod
    def refusal(cls, module: nn.Module, rules: LayerRules) -> str | None:
        """Why this module cannot be replaced, or None."""
        return None

    @classmethod
    def keeps(cls, module: nn.Module, rules: LayerRules) -> str:
        """What the layer keeps for backward, in words for the report."""
        pruned = rules.pruned
        if pruned.sparsity == 0:
            return f"input, all of it, {pruned.values}"
        kept = f"input at sparsity {pruned.sparsity:g}, {pruned.values}, index {pruned.index}"
        return kept if pruned.fill == "zero" else f"{kept}, dropped: {pruned.fill}"

    @classmethod
    def rules_used(cls, module: nn.Module) -> tuple[str, ...]:
        """Which fields of ``LayerRules`` decide what the layer keeps, as it stands now. The report names their
        precision."""
        return ("pruned",) if cls.packs else ()

    def flag_for(self, x: Tensor) -> Tensor:
        """The layer's status bits, int32 (1,), on the device of ``x``.

        Raises:
            RuntimeError: ``torch.jit.trace`` records.
            TypeError: ``x`` stands for a tensor that ``torch.fx`` traces.
        """
        if not torch.compiler.is_dynamo_compiling():
            refuse_tracing(x)
        if not isinstance(x, Tensor):
            return torch.zeros(1, dtype=torch.int32)  # for the dense operator's refusal
        return self.__dict__[STATUS].on(x.device)

    __prepare_scriptable__ = refuse_script


class MadeDropIn(DropIn):
    """A drop-in that fits many classes: ``made`` derives one from it and from the class it replaces."""

    @classmethod
    def members_for(cls, original: type[nn.Module]) -> dict[str, Any]:
        """Class attributes of the drop-in of ``original``."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> str | tuple[Any, ...]:
        cls = type(self)
        if "_made_for" not in vars(cls):  # pickle finds it by its name, or not at all
            return super().__reduce_ex__(protocol)
        state = {key: value for key, value in self.__dict__.items() if key != _GIVEN}
        return _restore, (cls.__bases__[0], vars(cls)["_made_for"]), state


@cache
def made(base: type[MadeDropIn], original: type[nn.Module]) -> type[MadeDropIn]:
    """The drop-in of ``original`` that ``base`` is for it."""
    members = {"__module__": base.__module__, "_made_for": original, **base.members_for(original)}
    return type(f"Razor{original.__name__}", (base, original), members)


def _restore(base: type[MadeDropIn], original: type[nn.Module]) -> nn.Module:
    cls = made(base, original)
    module = cls.__new__(cls)
    module.__dict__[_GIVEN] = cls
    return module


def class_given_to(module: DropIn) -> type[DropIn]:
    """The drop-in class that ``razor_`` gave a module; its class now may be one that was derived from it since."""
    return module.__dict__[_GIVEN]


def status_flags(module: nn.Module) -> list[Tensor]:
    """The status bits of a module, one int32 (1,) per device that it has run on; none for a module that is no
    drop-in."""
    return module.__dict__[STATUS].flags if isinstance(module, DropIn) else []


def is_frozen(norm: nn.Module) -> bool:
    """Whether a BatchNorm is a fixed scale and shift now: running statistics, no trained affine."""
    affine = (norm.weight, norm.bias)
    has_statistics = norm.running_mean is not None and norm.running_var is not None
    return not norm.training and has_statistics and not any(p is not None and p.requires_grad for p in affine)


def is_patched(module: nn.Module) -> bool:
    """Whether a function on the instance runs instead of the ``forward`` of its class, or of a part of it."""
    return "forward" in module.__dict__ or "_conv_forward" in module.__dict__


def has_its_own_forward(cls: type[nn.Module]) -> bool:
    """Whether the ``forward`` of a class is the one that it was defined with, and no function put there since."""
    owner = next(parent for parent in cls.__mro__ if "forward" in vars(parent))
    forward = vars(owner)["forward"]
    names = getattr(forward, "__module__", None), getattr(forward, "__qualname__", None)
    return names == (owner.__module__, f"{owner.__qualname__}.forward")


def attach(module: nn.Module, cls: type[DropIn], rules: LayerRules, devices: Iterable[torch.device]) -> None:
    """Turn ``module``, of a model on ``devices``, into the drop-in ``cls``."""
    status = Status()
    if cls.packs:
        status.prepare(module, devices)
    module.__dict__.update({ORIGINAL: type(module), _GIVEN: cls, STATUS: status, "razor": rules})
    module.__class__ = cls


class Earlier(NamedTuple):
    """A module as an earlier ``razor_`` left it: its class and what was put into its ``__dict__``."""

    module: nn.Module
    cls: type[nn.Module]
    own: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> Earlier:
        """The module as it stands now."""
        return cls(module, type(module), {key: module.__dict__[key] for key in _OWN if key in module.__dict__})

    def restore(self) -> None:
        """Make the module again what it was."""
        self.module.__dict__.update(self.own)
        self.module.__class__ = self.cls


def why_not_detached(module: nn.Module, base: type[nn.Module]) -> str | None:
    """What was done to a module, to which ``razor_`` gave the class ``base``, that the way back would undo or break, in
    words; None where there is nothing."""
    if is_patched(module):
        return (
            "its forward was replaced after razor_ and may call what unrazor_ removes: "
            "take the replacement off first (accelerate: remove_hook_from_module)"
        )
    return why_not_rebased(module, base)


def why_not_rebased(module: nn.Module, base: type[nn.Module]) -> str | None:
    """Why the class of a module cannot be turned back into one without ``base``; None where it can."""
    if not _can_be_rebased(type(module), base):
        return f"its class was changed to {type(module).__name__} after razor_: change it back first"
    return None


def detach(module: nn.Module) -> None:
    """Turn a drop-in back into what it was."""
    module.__class__ = rebased(type(module), class_given_to(module), module.__dict__[ORIGINAL])
    for name in _OWN:
        module.__dict__.pop(name, None)


def _can_be_rebased(cls: type, base: type) -> bool:
    """Whether ``cls`` is ``base``, or a class made from it at run time that does not know its own name (a function
    that calls ``super()`` does)."""
    if cls is base:
        return True
    functions = [function for value in vars(cls).values() for function in _functions(value)]
    knows_itself = any("__class__" in function.__code__.co_freevars for function in functions)
    derived = [parent for parent in cls.__bases__ if issubclass(parent, base)]
    return not knows_itself and bool(derived) and all(_can_be_rebased(parent, base) for parent in derived)


def _functions(value: object) -> list[FunctionType]:
    """The functions behind a member of a class."""
    if isinstance(value, property):
        found = (value.fget, value.fset, value.fdel)
    elif isinstance(value, (staticmethod, classmethod)):
        found = (value.__func__,)
    else:
        found = (value,)
    return [function for function in found if isinstance(function, FunctionType)]


def rebased(cls: type, base: type, onto: type) -> type:
    """``onto`` for ``base``; for a class that was derived from ``base`` at run time, such as the one that
    ``torch.nn.utils.parametrize`` makes, the same class derived from ``onto``."""
    if cls is base:
        return onto
    parents = tuple(rebased(parent, base, onto) if issubclass(parent, base) else parent for parent in cls.__bases__)
    members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__.replace(base.__name__, onto.__name__), parents, members)
