"""How threads share the work of a launch: atomic additions to what every argument block ends with."""

from __future__ import annotations

from numba.core import types
from numba.extending import intrinsic

from .vectors import I8, I64


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
