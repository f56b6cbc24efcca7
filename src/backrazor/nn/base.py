"""What every drop-in has: the resolved rules of its layer, a flag for bad numbers, and the class it came from.

A drop-in is a subclass of the layer it replaces, put in place by changing the object's class. Parameters, buffers,
hooks, mode, names and every reference to the module stay as they are; the way back is the same assignment.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import FunctionType
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..codecs import Pruned
from ..codecs.normalised import NormCodec
from ..functional.attention import AttentionCodec
from ..functional.transforms import is_wrapped, refuse_script, refuse_tracing

UNKNOWN = object()  # an activation inside a norm layer that is no drop-in

ORIGINAL, _STATUS = "_backrazor_original", "_backrazor_status"


@dataclass(frozen=True, slots=True)
class LayerRules:
    """The configuration as one layer sees it."""

    pruned: Pruned
    norm: NormCodec
    activation: str
    attention: AttentionCodec


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

    def __deepcopy__(self, memo: dict) -> Status:
        copied = Status()
        for device in self._flags:
            copied.on(device)
        return copied

    def __reduce__(self) -> tuple:
        return Status, ()


class DropIn(nn.Module):
    """Mixin of the drop-ins. ``razor`` holds the layer's rules."""

    razor: LayerRules
    packs: ClassVar[bool] = True  # whether it has a flag for non-finite values and overflow
    prunes: ClassVar[bool] = False  # whether it prunes its input per sample
    link: ClassVar[str | None] = None  # its part in a chain: "linear", "conv", "norm" or "activation" (see fusion.py)

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
        return f"input at sparsity {pruned.sparsity:g}, {pruned.values}, index {pruned.index}"

    def flag_for(self, x: Tensor) -> Tensor:
        """The layer's status bits, int32 (1,), on the device of ``x``.

        Raises:
            RuntimeError: ``torch.jit.trace`` records.
            TypeError: ``x`` stands for a tensor that ``torch.fx`` traces.
        """
        if not torch.compiler.is_compiling():
            refuse_tracing(x)
        if not isinstance(x, Tensor):
            return torch.zeros(1, dtype=torch.int32)  # for the dense operator's refusal
        return self.__dict__[_STATUS].on(x.device)

    __prepare_scriptable__ = refuse_script


class MadeDropIn(DropIn):
    """A drop-in whose class is made for the class it replaces, so that pickle cannot find it by name."""

    def __reduce__(self):
        if type(self) is not class_given_to(self):  # derived from it since: that class's own affair
            return object.__reduce_ex__(self, 4)
        return _restore, (self.__dict__[ORIGINAL],), self.__dict__


def _restore(original: type[nn.Module]) -> nn.Module:
    from . import drop_in_of  # the table of drop-ins stands above this module

    cls = drop_in_of(original)
    return cls.__new__(cls)


def class_given_to(module: DropIn) -> type[DropIn]:
    """The drop-in class that ``razor_`` gave a module; its class now may be one that was derived from it since."""
    from . import drop_in_of

    return drop_in_of(module.__dict__[ORIGINAL])


def status_flags(module: nn.Module) -> list[Tensor]:
    """The status bits of a module, one int32 (1,) per device that it has run on; none for a module that is no
    drop-in."""
    return module.__dict__[_STATUS].flags if isinstance(module, DropIn) else []


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


def attach(module: nn.Module, cls: type[DropIn], rules: LayerRules) -> None:
    """Turn ``module`` into the drop-in ``cls``."""
    status = Status()
    if cls.packs:  # made now for where it is going to be needed, so that tracing finds it
        for device in {t.device for t in (*module.parameters(), *module.buffers())}:
            status.on(device)
    module.__dict__.update({ORIGINAL: type(module), _STATUS: status, "razor": rules})
    module.__class__ = cls


def why_not_detached(module: nn.Module, base: type[nn.Module]) -> str | None:
    """What was done to a module, to which ``razor_`` gave the class ``base``, that the way back would undo or break, in
    words; None where there is nothing."""
    if is_patched(module):
        return (
            "its forward was replaced after razor_ and may call what unrazor_ removes: "
            "take the replacement off first (accelerate: remove_hook_from_module)"
        )
    if not _can_be_rebased(type(module), base):
        return f"its class was changed to {type(module).__name__} after razor_: change it back first"
    return None


def detach(module: nn.Module) -> None:
    """Turn a drop-in back into what it was."""
    module.__class__ = rebased(type(module), class_given_to(module), module.__dict__[ORIGINAL])
    for name in (ORIGINAL, _STATUS, "razor"):
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
