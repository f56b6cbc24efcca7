"""What every drop-in has: the resolved rules of its layer, a flag for bad numbers, and the class it came from.

A drop-in is a subclass of the layer it replaces, put in place by changing the object's class. Parameters, buffers,
hooks, mode, names and every reference to the module stay as they are; the way back is the same assignment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..codecs import Pruned
from ..codecs.normalised import NormCodec
from ..functional.attention import AttentionCodec

FLAG = "_backrazor_flag"
UNKNOWN = object()  # an activation inside a norm layer that is no drop-in


@dataclass(frozen=True, slots=True)
class LayerRules:
    """The configuration as one layer sees it."""

    pruned: Pruned
    norm: NormCodec
    activation: str
    attention: AttentionCodec


class DropIn(nn.Module):
    """Mixin of the drop-ins. ``razor`` holds the layer's rules."""

    razor: LayerRules
    packs: ClassVar[bool] = True  # whether it has a flag for non-finite values and overflow
    prunes: ClassVar[bool] = False  # whether it prunes its input a sample
    link: ClassVar[str | None] = (
        None  # its part in a chain that runs as one operator: "conv", "norm" or "activation" (see fusion.py)
    )

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

    @property
    def _passes_through(self) -> bool:
        """Whether the module that leads its chain has done this one's work already."""
        if "_backrazor_norm" not in self.__dict__:
            return False
        norm = self._backrazor_norm  # in a tuple, so that it is no submodule; empty in a chain without a norm
        return not norm or is_frozen(norm[0])

    @property
    def _flag(self) -> Tensor:
        return self._buffers[FLAG]


class MadeDropIn(DropIn):
    """A drop-in whose class is made for the class it replaces, so that pickle cannot find it by name."""

    def __reduce__(self):
        return _restore, (self._backrazor_original,), self.__dict__


def _restore(original: type[nn.Module]) -> nn.Module:
    from . import drop_in_of  # the table of drop-ins stands above this module

    cls = drop_in_of(original)
    return cls.__new__(cls)


def is_frozen(norm: nn.Module) -> bool:
    """Whether a BatchNorm is a fixed scale and shift now: running statistics, no trained affine."""
    affine = (norm.weight, norm.bias)
    has_statistics = norm.running_mean is not None and norm.running_var is not None
    return not norm.training and has_statistics and not any(p is not None and p.requires_grad for p in affine)


def attach(module: nn.Module, cls: type[DropIn], rules: LayerRules) -> None:
    """Turn ``module`` into the drop-in ``cls``."""
    module.razor = rules
    module._backrazor_original = type(module)
    if cls.packs:
        device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
        module.register_buffer(FLAG, torch.zeros(1, dtype=torch.int32, device=device), persistent=False)
    module.__class__ = cls


def detach(module: nn.Module) -> None:
    """Turn a drop-in back into what it was."""
    module.__class__ = module._backrazor_original
    for name in ("_backrazor_original", "razor", "_backrazor_followers", "_backrazor_norm"):
        module.__dict__.pop(name, None)
    if FLAG in module._buffers:
        delattr(module, FLAG)
