"""The paper's recipe for a backbone and a data set that a command line names without an experiment.

A recipe is called <model>/<data>. Every key and group on the command line overrides it, and ``recipe=none`` leaves it
out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from razorlab.composition import composed
from razorlab.errors import UserError

NONE = "none"
_NAME = re.compile(r"\w+")  # anything else is a list, or no name
# Groups that a backbone's recipes choose, too. A recipe cannot: it lies below both, so that they win over it.
TAKES = {"tinytl": {"method": "tinytl_lb", "razor": "none"}}


def recipe_of(overrides: Sequence[str]) -> str | None:
    """Return the recipe that ``overrides`` name, None where they name none or ``recipe=none``."""
    name = _named(overrides, "recipe")
    return None if name == NONE else name


def with_recipe(overrides: Sequence[str]) -> list[str]:
    """Return ``overrides`` with the recipe of the pair that they name, where there is one for it.

    Nothing is added where they name an experiment or a recipe, or several models or data sets: the runs of a sweep find
    their recipes one by one.

    Args:
        overrides: ``key=value`` words, among others.

    Raises:
        UserError: they name another optimizer than the recipe's and no learning rate for it.
    """
    words = list(overrides)
    model, data = _named(words, "model"), _named(words, "data")
    if model is None or data is None or _named(words, "recipe") is not None:
        return words
    if _named(words, "task") not in (None, "classification"):  # recipes are of classification
        return words
    if _named(words, "experiment") not in (None, "null") or not _NAME.fullmatch(model) or not _NAME.fullmatch(data):
        return words
    name = f"{model}/{data}"
    if name not in composed("recipe"):
        return words
    _check_optimizer(words, name)
    place = max(index for index, word in enumerate(words) if _group(word) == "model")
    chosen = [f"{group}={option}" for group, option in TAKES.get(model, {}).items() if not _touched(words, group)]
    return [*words[: place + 1], f"recipe={name}", *chosen, *words[place + 1 :]]


def _check_optimizer(words: Sequence[str], name: str) -> None:
    asked, own = _named(words, "optim"), composed("recipe")[name].groups["optim"]
    if asked not in (None, own) and _named(words, "optim.lr") is None:
        raise UserError(
            f"optim={asked} is not what the recipe {name} is made for: its learning rate belongs to {own}; "
            "add optim.lr=..., or recipe=none for the plain defaults"
        )


def _group(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def _touched(words: Sequence[str], group: str) -> bool:
    """Whether a word names ``group`` or a key of it."""
    return any(_group(word).partition(".")[0] == group for word in words)


def _named(words: Sequence[str], group: str) -> str | None:
    """The last value that ``group`` is given."""
    return next((word.partition("=")[2] for word in reversed(words) if _group(word) == group and "=" in word), None)
