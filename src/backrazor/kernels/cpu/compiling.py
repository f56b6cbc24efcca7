"""From a worker to machine code. A process that finds its kernels on disk does not import this module.

Settings (the kind of element, the width of a code) are numbers that are constant in an entry point, so LLVM prunes what
they rule out, and one source serves all.
"""

from __future__ import annotations

import ctypes
import sys
import types as python_types
from collections.abc import Callable
from functools import cache

import numba
from numba.core import types
from numba.extending import intrinsic

from . import objects
from .arguments import Arguments
from .kept import cache_folder, is_writable

_FIELD_TYPES = {ctypes.c_int64: types.int64, ctypes.c_float: types.float32}


@cache
def announce_once() -> None:
    """Say on stderr that this process compiles: the first step takes seconds longer than the next."""
    folder = cache_folder()
    if is_writable(folder):
        kept = f"kept in {folder} for later runs (python -m backrazor.warmup does it beforehand)"
    else:
        kept = f"for this process alone, as {folder} is not writable (BACKRAZOR_CACHE_DIR names another folder)"
    print(f"backrazor: compiling kernels for this processor, {kept}", file=sys.stderr, flush=True)


@cache
def record_of(block: type[Arguments]) -> types.Record:
    """An argument block as Numba sees it."""
    fields = [(key, {"type": _FIELD_TYPES[kind], "offset": getattr(block, key).offset}) for key, kind in block._fields_]
    return types.Record(fields, ctypes.sizeof(block), aligned=True)


@intrinsic
def _pointee(typingctx, pointer):
    """The record at a pointer, without a copy."""
    record = pointer.dtype

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(record))

    return record(pointer), codegen


def _template(pointer):
    WORKER(_pointee(pointer), *SETTINGS)  # noqa: F821 (globals of each entry point)


def compiled(
    function: Callable[..., None], block: type[Arguments], settings: tuple[int, ...], name: str
) -> tuple[str, str]:
    """The name of a C function of one pointer to a ``block``, which runs ``function(arguments, *settings)``, and its
    optimised LLVM code. ``name`` is part of that name."""
    announce_once()
    own = {"WORKER": function, "SETTINGS": settings, "_pointee": _pointee, "__name__": __name__}
    entry = python_types.FunctionType(_template.__code__, own, function.__name__)
    entry.__qualname__ = name
    signature = types.void(types.CPointer(record_of(block)))
    made = numba.cfunc(signature, error_model="numpy")(entry)
    return made.native_name, made.inspect_llvm()


def machine_code(
    function: Callable[..., None], block: type[Arguments], settings: tuple[int, ...], name: str
) -> tuple[str, bytes]:
    """The same as an object file."""
    symbol, code = compiled(function, block, settings, name)
    return symbol, objects.object_of(code)
