"""The command line that a record came from, found again from its configuration. No hydra."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from razorlab.composition import composed, content
from razorlab.groups import file_names, read_file
from razorlab.records import task_of
from razorlab.settings import defaults, flatten

_PLAIN = re.compile(r"[A-Za-z_./][\w./-]*")  # what Hydra takes for a text without quotes
UNNAMED = {"model": "timm"}  # the group's file for a name that has none of its own


def command_of(record: Mapping[str, Any]) -> str:
    """Return ``python train.py ...`` with what ``record`` sets otherwise than the defaults.

    Where a run goes (``paths.*``) is left out. The experiment or the recipe is named if it is still there.
    """
    config, experiment, recipe = record["config"], record["experiment"], record.get("recipe")
    body = read_file("train")
    choices = _choices(body)
    arguments, beneath = [], {}
    own = {group: _choice(config, group) for group in choices if group in config}
    pair = f"{own['model']}/{own['data']}"
    if experiment and (found := content("experiment", experiment)) is not None:
        arguments, beneath = [f"experiment={experiment}"], {"experiment": found}
    elif pair in composed("recipe"):
        if recipe:
            beneath = {"recipe": content("recipe", pair) or {}}
            arguments = [f"{group}={own[group]}" for group in ("model", "data")]
            choices |= {group: own[group] for group in ("model", "data")}
        else:
            arguments = ["recipe=none"]
    for found in beneath.values():
        choices |= {group.removeprefix("override /"): name for group, name in _choices(found).items()}
    for group, name in own.items():
        if name is not None and name != choices[group]:
            arguments.append(f"{group}={name}")
            choices[group] = name
    base: dict[str, Any] = defaults()
    _merge(base, body)
    for group, name in choices.items():
        if group in beneath:
            _merge(base, beneath[group])
        elif group in config:
            _merge(base.setdefault(group, {}), content(group, name) or {})
    known = dict(flatten(base))
    for path, value in flatten(config):
        if not path.startswith("paths.") and known.get(path, "???") != value:
            arguments.append(f"{path}={_text(value)}")
    return shlex.join(["python", "train.py", *arguments])


def _choices(body: dict[str, Any]) -> dict[str, str]:
    """Take the defaults list out of a file's content and return what it chooses, in its order."""
    entries = [entry for entry in body.pop("defaults", []) if isinstance(entry, Mapping)]
    chosen = {group: name for entry in entries for group, name in entry.items()}
    return {group: name for group, name in chosen.items() if not group.startswith("override hydra/")}


def _choice(config: Any, group: str) -> Any:
    name = config.get(group, {}).get("name")
    if name is None or name in file_names(group):
        return name
    return "hf" if group == "model" and task_of(config) == "text" else UNNAMED.get(group)


def _merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) and value.lower() not in ("null", "true", "false", "nan", "inf")
        return value if plain else '"' + value.replace('"', '\\"') + '"'
    return str(value).lower() if isinstance(value, bool) else str(value)
