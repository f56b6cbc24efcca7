"""What a composed configuration is checked against: the schema, and settings that contradict each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from razorlab.conflicts import check_conflicts
from razorlab.errors import UserError
from razorlab.schema import KEYS, Config

BY_PATH = {key.path: key for key in KEYS}


def defaults() -> dict[str, Any]:
    """Return the nested mapping of every key's default."""
    nested: dict[str, Any] = {}
    for key in KEYS:
        *sections, name = key.path.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = key.default
    return nested


def changed(**sections: Mapping[str, Any]) -> Config:
    """Return the schema's defaults with the settings of ``sections`` in their place, valid."""
    config = defaults()
    for name, settings in sections.items():
        config[name] |= settings
    return validate(config)


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and value of every leaf of a nested mapping."""
    for name, value in config.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{path}.")
        else:
            yield path, value


def validate(config: Mapping[str, Any]) -> Config:
    """Check a composed configuration, a nested dict of plain values, and return it as what it then is.

    Raises:
        UserError: a key is unknown or missing, a value is not allowed, or two settings contradict each other.
    """
    given = dict(flatten(config))
    for path, value in given.items():
        if path not in BY_PATH:
            inside = next((key for key in BY_PATH if key.startswith(f"{path}.")), None)
            if inside is not None:
                raise UserError.value(path, "null" if value is None else value, f"keys, such as {inside}=...")
            raise UserError(f"{path} is not a key: `python train.py --help` lists them all")
    for path, key in BY_PATH.items():
        if path not in given:
            raise UserError(f"{path} is missing: it takes {key.allowed} ({key.help})")
        key.check(given[path])
    check_conflicts(given)
    return cast(Config, config)
