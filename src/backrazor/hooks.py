"""Hooks of this library that only look on.

Layers with somebody else's hook run by themselves, so that the hook sees what it would see in the dense network. A
passive hook looks at nothing between the members of a chain and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable

_PASSIVE = "_backrazor_passive"


def passive(hook: Callable) -> Callable:
    """Mark ``hook`` as one that only looks on; returns it."""
    setattr(hook, _PASSIVE, True)
    return hook


def is_passive(hook: Callable) -> bool:
    """Whether the hook is marked."""
    return getattr(hook, _PASSIVE, None) is True
