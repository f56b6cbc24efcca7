"""How a configuration is composed: the schema's defaults, the files in ``configs/``, and what tables compose in Python.

An experiment of a table is a row with a data set's recipe (``razorlab.recipes``, ``razorlab.experiments``). Hydra finds
it in its store, under the name that a file would have: ``experiment=table1/pets_full``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

from razorlab.experiments import TABLES, experiments
from razorlab.groups import CONFIGS, GROUPS, file_names, first_comment, read_file
from razorlab.recipes import Recipe, pairs
from razorlab.settings import defaults


@cache
def composed(group: str) -> Mapping[str, Recipe]:
    """Return by name what ``group`` offers beside its files; only ``experiment`` and ``recipe`` do."""
    if group == "experiment":
        return {recipe.name: recipe for table in TABLES for recipe in experiments(table)}
    return {recipe.name: recipe for recipe in pairs()} if group == "recipe" else {}


def options() -> dict[str, list[str]]:
    """Return the names that each group offers."""
    return {group: sorted((*file_names(group), *composed(group))) for group in GROUPS}


def content(group: str, name: str) -> dict[str, Any] | None:
    """Return what ``group=name`` sets, with its list of ``defaults``; None where there is nothing of that name."""
    if name in composed(group):
        recipe = composed(group)[name]
        chosen = [{f"override /{key}": option} for key, option in recipe.groups.items()]
        return {"defaults": chosen, **recipe.settings}
    return read_file(f"{group}/{name}") if name in file_names(group) else None


def described(group: str) -> list[str]:
    """Return a line for each name of ``group``: the name, and what it is."""
    names = options()[group]
    width = max(map(len, names))
    about = {
        name: composed(group)[name].about if name in composed(group) else first_comment(f"{group}/{name}")
        for name in names
    }
    return [f"{name:<{width}}  {text}".rstrip() for name, text in about.items()]


def register(overrides: Sequence[str]) -> None:
    """Make the schema's defaults known to Hydra, and the experiments and recipes that ``overrides`` name.

    Not all of them: Hydra copies its whole store for each configuration, which takes a second for 300.
    """
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema", node=defaults())
    for group in ("experiment", "recipe"):
        store.repo.pop(group, None)
        asked = " ".join(word for word in overrides if word.lstrip("+").startswith(f"{group}="))
        for name in composed(group):
            if name in asked or "*" in asked:
                folder, _, last = name.rpartition("/")
                store.store(name=last, node=content(group, name), group=f"{group}/{folder}", package="_global_")


def compose_config(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose ``configs/train.yaml`` with ``overrides``, as ``train.py`` does, and return plain values.

    Raises:
        hydra.errors.HydraException, omegaconf.errors.OmegaConfBaseException: an override is refused.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    register(overrides)
    running = GlobalHydra.instance().is_initialized()  # a job of train.py
    with nullcontext() if running else initialize_config_dir(str(CONFIGS), version_base="1.3"):
        plain: Any = OmegaConf.to_container(compose("train", overrides=list(overrides)), resolve=True)
        return plain
