"""What made a tensor, noted while ``torch.compile`` traces, so that what follows may run as one operator with it.

In a compiled graph no container tells which modules form a chain (see ``nn/fusion.py``). It takes none: an operator
that finds a note on its input computes its output from what the input was made of, and where nobody else reads the
input, the compiler drops its computation as dead. Where somebody does, it is there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class LinearRecipe(NamedTuple):
    """A Linear with a pruned input: its arguments, and what stands for the input."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    cast: torch.dtype | None
    packed: tuple


class ConvRecipe(NamedTuple):
    """The same of a Conv2d, and the norm that follows, if one does."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    spec: Any
    cast: torch.dtype | None
    packed: tuple
    norm: Any = None


_RECIPES = WeakTensorKeyDictionary()  # an output -> its version, the recipe


def remember_recipe(out: Tensor, recipe: LinearRecipe | ConvRecipe) -> None:
    """Note what made ``out``."""
    _RECIPES[out] = out._version, recipe


def recipe_of(x: Tensor) -> LinearRecipe | ConvRecipe | None:
    """What made x, or None where that is not known, or where x has been changed since."""
    version, recipe = _RECIPES.get(x, (None, None))
    return recipe if version == x._version else None
