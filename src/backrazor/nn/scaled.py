"""Drop-ins for blocks that scale a branch by a parameter of their own, as LayerScale does, without a module for it.

The original forward runs with that one product replaced: it keeps the branch pruned, for the gradient of the scale.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import functional
from .base import DropIn, LayerRules, MadeDropIn, made

_PRODUCTS = (torch.mul, Tensor.mul)  # the operator * is the second


class _Replaced(TorchFunctionMode):
    """Products with a parameter of ``module`` itself, or a view of one, through the pruned operator."""

    def __init__(self, module: DropIn) -> None:
        super().__init__()
        self._module = module

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _PRODUCTS and not kwargs and all(isinstance(x, Tensor) for x in args):
            for scale, x in (args, args[::-1]):
                if self._is_own(scale) and not self._is_own(x):
                    return functional.channel_scale(x, scale, self._module.razor.pruned, self._module.flag_for(x))
        return function(*args, **(kwargs or {}))

    def _is_own(self, x: Tensor) -> bool:
        own = self._module._parameters.values()
        return any(x is parameter or x._base is parameter for parameter in own if parameter is not None)


class ScaledBlock(MadeDropIn):
    """The original forward, what it scales kept pruned."""

    prunes = True

    @classmethod
    def keeps(cls, module: nn.Module, rules: LayerRules) -> str:
        own = [name for name, parameter in module._parameters.items() if parameter is not None]
        return f"what {', '.join(own)} scales: {super().keeps(module, rules)}" if own else "nothing of its own"

    @classmethod
    def rules_used(cls, module: nn.Module) -> tuple[str, ...]:
        return ("pruned",) if any(parameter is not None for parameter in module._parameters.values()) else ()

    def forward(self, *args: object, **kwargs: object) -> object:
        with _Replaced(self):
            return super().forward(*args, **kwargs)


def scaled_block(original: type[nn.Module]) -> type[MadeDropIn]:
    """The drop-in of a block class."""
    return made(ScaledBlock, original)
