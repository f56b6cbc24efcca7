"""What a kernel is told: a struct with named fields, declared once and read by name on both sides.

    @arguments
    class Double:
        n: int  # an int64: a number, or the address of a tensor's data
        source: int
        to: int
        factor: float  # a float32

    @njit(forceinline=True)
    def double_worker(a, kind):
        ...  # a.n, a.factor

    launch(double_worker, Double(n=..., source=..., to=..., factor=2.0), tasks=..., settings=(kind,))

Host code fills a ctypes structure by keywords; the kernel sees a Numba record whose offsets are those of the structure.
So the order of fields has no meaning anywhere.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, ClassVar, get_type_hints

from numba.core import types
from numba.extending import intrinsic

from .vectors import I8, I64

_FIELD_TYPES = {int: (ctypes.c_int64, types.int64), float: (ctypes.c_float, types.float32)}


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
    record: ClassVar[types.Record]


def arguments(declared: type) -> type[Arguments]:
    """The class of argument blocks with the annotated fields of ``declared``, ``int`` or ``float``."""
    own = get_type_hints(declared)
    return struct(declared.__name__, own | get_type_hints(Counters), frozenset(own))


def struct(name: str, kinds: dict[str, type], names: frozenset[str]) -> type[Arguments]:
    """Fields of ``kinds`` in that order, of which host code gives ``names``."""
    members = {"_fields_": [(key, _FIELD_TYPES[kind][0]) for key, kind in kinds.items()]}
    made = type(name, (Arguments,), members | {"__init__": _initialiser(kinds, names), "names": names})
    fields = [
        (key, {"type": _FIELD_TYPES[kind][1], "offset": getattr(made, key).offset}) for key, kind in kinds.items()
    ]
    made.record = types.Record(fields, ctypes.sizeof(made), aligned=True)
    return made


def _initialiser(kinds: dict[str, type], names: frozenset[str]) -> Callable[..., None]:
    """``__init__`` of keywords, written out as dataclasses do it: Python checks the names, in half the time that a
    comparison of sets takes (1.7 against 3.4 microseconds for 14 fields; a launch has 8 in all)."""
    parameters = ", ".join(name for name in kinds if name in names)
    values = ", ".join(name if name in names else "0" for name in kinds)
    scope: dict[str, Any] = {"fill": ctypes.Structure.__init__}
    exec(f"def __init__(self, *, {parameters}):\n    fill(self, {values})", scope)
    return scope["__init__"]


def _counter(field: str):
    """(arguments, amount) -> the int64 in ``field`` before an atomic addition."""

    @intrinsic
    def take(typingctx, arguments, amount):
        offset = arguments.offset(field)

        def codegen(context, builder, signature, args):
            start = builder.bitcast(args[0], I8.as_pointer())
            place = builder.bitcast(builder.gep(start, [I64(offset)]), I64.as_pointer())
            return builder.atomic_rmw("add", place, args[1], "seq_cst")

        return types.int64(arguments, types.int64), codegen

    return take


take_tasks = _counter("next_task")  # the first of ``amount`` pieces of work, which are this thread's from now on
count_threads = _counter("next_thread")  # with an amount of 1, once per thread: its number, from 0
