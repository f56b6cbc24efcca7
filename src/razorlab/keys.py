"""What a configuration key takes, and the refusal of anything else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from backrazor.config import WORDS
from razorlab.errors import UserError

# Keys of the razor section that change a preset, and that are null where they do not.
RAZOR_OVERRIDES = (*WORDS, "head_sparsity")
REQUIRED = "???"  # Hydra's word for a value that a group's file or the command line must bring


@dataclass(frozen=True)
class Key:
    """One configuration key: what stands beside a field's type, and what ``keys_of`` reads from the field.

    Args:
        default: its value where no group's file, experiment or argument says otherwise; ``REQUIRED`` has none.
        help: meaning and unit.
        choices: the allowed strings; empty for any, or those of a ``Literal``.
        low, high: allowed range of a number; ``open_low``/``open_high`` leave the end itself out.
        path: dotted name, as written on the command line.
        kind: ``int``, ``float``, ``bool`` or ``str``; an int is a valid float, a bool is never a number.
        optional: whether ``null`` is allowed.
    """

    default: Any
    help: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    path: str = ""
    kind: type = str
    optional: bool = False

    @property
    def allowed(self) -> str:
        """What the key takes, in words."""
        if self.choices:
            text = "|".join(self.choices)
        elif self.kind is bool:
            text = "true|false"
        elif self.kind is str:
            text = "a text"
        else:
            text = "a whole number" if self.kind is int else "a number"
            if self.low is not None and self.high is not None:
                text += (
                    f" in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"
                )
            elif self.low is not None:
                text += f" {'above' if self.open_low else 'from'} {self.low:g}"
        return text + (" or null" if self.optional else "")

    def check(self, value: Any) -> None:
        """Raise ``UserError`` where ``value`` is not allowed, or there is none."""
        if value == REQUIRED:
            raise UserError(f"{self.path} must be given ({self.help}): write {self.path}=...")
        if not self._accepts(value):
            shown = "null" if value is None else value
            raise UserError.value(self.path, shown, f"{self.allowed} ({self.help})")

    def _accepts(self, value: Any) -> bool:
        if value is None:
            return self.optional
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not self.kind:
            return False
        if self.choices or self.kind not in (int, float):
            return not self.choices or value in self.choices
        number: Any = value
        above = self.low is None or number > self.low or (number == self.low and not self.open_low)
        below = self.high is None or number < self.high or (number == self.high and not self.open_high)
        return math.isfinite(number) and above and below


def keys_of(section: Any, prefix: str = "") -> Iterator[Key]:
    """Yield the keys of a typed dictionary and of those in it: ``Annotated[type, Key(...)]`` each."""
    for name, hint in get_type_hints(section, include_extras=True).items():
        if get_origin(hint) is not Annotated:
            yield from keys_of(hint, f"{prefix}{name}.")
            continue
        kind, key = get_args(hint)
        optional = type(None) in get_args(kind)
        plain = get_args(kind)[0] if optional else kind  # of ``float | None``
        words = get_args(plain)  # of a ``Literal``
        kind = str if words else plain
        yield replace(key, path=f"{prefix}{name}", kind=kind, choices=words or key.choices, optional=optional)
