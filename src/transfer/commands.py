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

    Where a run goes (``paths.*``) is left out. The experiment's own file is used if it is there.
    """
    config, experiment = record["config"], record["experiment"]
    base, choices = _defaults(configs)
    arguments = []
    if experiment and (file := configs / "experiment" / f"{experiment}.yaml").is_file():
        arguments.append(f"experiment={experiment}")
        body = _read(file)
        overridden = [entry for entry in body.pop("defaults", []) if isinstance(entry, Mapping)]
        choices |= {key.removeprefix("override /"): name for entry in overridden for key, name in entry.items()}
        base |= {group: _read(configs / group / f"{name}.yaml") for group, name in choices.items()}
        _merge(base, body)
    for group in choices:
        name = _choice(config, group, configs)
        if name is not None and name != choices[group]:
            arguments.append(f"{group}={name}")
            base[group] = _read(configs / group / f"{name}.yaml")
    known = dict(flatten(base))
    for path, value in flatten(config):
        if not path.startswith("paths.") and known.get(path, "???") != value:
            arguments.append(f"{path}={_text(value)}")
    return shlex.join(["python", "train.py", *arguments])


def _defaults(configs: Path) -> tuple[dict[str, Any], dict[str, str]]:
    body = _read(configs / "train.yaml")
    body.pop("hydra", None)
    chosen = [entry for entry in body.pop("defaults") if isinstance(entry, Mapping)]
    choices = {
        group: name for entry in chosen for group, name in entry.items() if name and not group.startswith("override")
    }
    return body | {group: _read(configs / group / f"{name}.yaml") for group, name in choices.items()}, choices


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
