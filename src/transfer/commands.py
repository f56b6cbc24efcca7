"""The command line that a record came from, found again from its configuration. No torch, no hydra."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from transfer.records import task_of
from transfer.settings import flatten

_PLAIN = re.compile(r"[A-Za-z_./][\w./-]*")  # what Hydra takes for a text without quotes
UNNAMED = {"model": "timm"}  # the group's file for a name that has none of its own


def command_of(record: Mapping[str, Any], configs: Path) -> str:
    """Return ``python train.py ...`` with what ``record`` sets otherwise than the files in ``configs``.

    Where a run goes (``paths.*``) is left out. The experiment's or the recipe's own file is used if it is there.
    """
    config, experiment, recipe = record["config"], record["experiment"], record.get("recipe")
    body = _read(configs / "train.yaml")
    choices = _choices(body)
    arguments, beneath = [], {}
    own = {group: _choice(config, group, configs) for group in choices if group in config}
    if experiment and (file := configs / "experiment" / f"{experiment}.yaml").is_file():
        arguments, beneath = [f"experiment={experiment}"], {"experiment": _read(file)}
    elif (file := configs / "recipe" / f"{own['model']}" / f"{own['data']}.yaml").is_file():
        if recipe:
            beneath = {"recipe": _read(file)}
            arguments = [f"{group}={own[group]}" for group in ("model", "data")]
            choices |= {group: own[group] for group in ("model", "data")}
        else:
            arguments = ["recipe=none"]
    for content in beneath.values():
        choices |= {group.removeprefix("override /"): name for group, name in _choices(content).items()}
    for group, name in own.items():
        if name is not None and name != choices[group]:
            arguments.append(f"{group}={name}")
            choices[group] = name
    base: dict[str, Any] = body
    for group, name in choices.items():
        if group in beneath:
            _merge(base, beneath[group])
        elif group in config:
            _merge(base.setdefault(group, {}), _read(configs / group / f"{name}.yaml"))
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


def _choice(config: Mapping[str, Any], group: str, configs: Path) -> str | None:
    name = config.get(group, {}).get("name")
    if name is None or (configs / group / f"{name}.yaml").is_file():
        return name
    return "hf" if group == "model" and task_of(config) == "text" else UNNAMED.get(group)


def _read(file: Path) -> dict[str, Any]:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    return _numbers(content)


def _numbers(content: Any) -> Any:
    """YAML 1.1 takes ``3e-4`` for a text; Hydra does not."""
    if isinstance(content, dict):
        return {key: _numbers(value) for key, value in content.items()}
    if isinstance(content, str):
        try:
            return float(content)
        except ValueError:
            return content
    return content


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
