"""What a kernel is told: a struct with named fields, declared once and read by name on both sides.

    @arguments
    class Double:
        n: int  # an int64: a number, or the address of a tensor's data
        source: int
        to: int
        factor: float  # a float32

    launch(Worker(f"{__package__}._cpu_double", "double_worker"), Double(n=..., source=..., to=..., factor=2.0), tasks)

and in ``_cpu_double.py``, which is imported where the worker has to be compiled:

    @njit(forceinline=True)
    def double_worker(a):
        ...  # a.n, a.factor

Host code fills a ctypes structure by keywords; the kernel sees a Numba record whose offsets are those of the structure
(``compiling.record_of``). So the order of fields has no meaning anywhere.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, ClassVar, get_type_hints

_FIELD_TYPES = {int: ctypes.c_int64, float: ctypes.c_float}


class Counters:
    """What every block has beside its own fields, zero at first."""

    next_task: int  # the first piece of work that no thread has taken
    next_thread: int  # how many threads have started


class Arguments(ctypes.Structure):
    """One call's arguments, made by ``arguments``: all of its own fields are given, by keyword, and no others.

    Raises:
        TypeError: a field is missing or not known.
    """

    names: ClassVar[frozenset[str]]


def arguments(declared: type) -> type[Arguments]:
    """The class of argument blocks with the annotated fields of ``declared``, ``int`` or ``float``."""
    own = get_type_hints(declared)
    return struct(declared.__name__, own | get_type_hints(Counters), frozenset(own))


def struct(name: str, kinds: dict[str, type], names: frozenset[str]) -> type[Arguments]:
    """Fields of ``kinds`` in that order, of which host code gives ``names``."""
    members = {"_fields_": [(key, _FIELD_TYPES[kind]) for key, kind in kinds.items()]}
    return type(name, (Arguments,), members | {"__init__": _initialiser(kinds, names), "names": names})


def _initialiser(kinds: dict[str, type], names: frozenset[str]) -> Callable[..., None]:
    """``__init__`` of keywords, written out as dataclasses do it: Python checks the names, in half the time that a
    comparison of sets takes (1.7 against 3.4 microseconds for 14 fields; a launch has 8 in all)."""
    parameters = ", ".join(name for name in kinds if name in names)
    values = ", ".join(name if name in names else "0" for name in kinds)
    scope: dict[str, Any] = {"fill": ctypes.Structure.__init__}
    exec(f"def __init__(self, *, {parameters}):\n    fill(self, {values})", scope)
    return scope["__init__"]
