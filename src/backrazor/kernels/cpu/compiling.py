"""From a worker to machine code: one entry point for each worker, argument block and choice of settings.

Settings (the kind of element, the width of a code) are numbers that are constant in an entry point, so LLVM prunes what
they rule out, and one source serves all. The code is kept on disk (``objects``), in ``cache_folder()``; its name there
holds the state of all CPU sources and the processor that it is made for.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import threading
import types as python_types
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import numba
from numba.core import types
from numba.extending import intrinsic

from . import objects
from .arguments import Arguments
from .target import target

EntryPoint = tuple[Callable[..., None], type[Arguments], tuple[int, ...]]  # what ``entry_point`` takes
KERNELS = Path(__file__).resolve().parents[1]
_CPU_SOURCES = ("cpu/*.py", "*/cpu.py", "*/_cpu_*.py", "*/layout.py")
_lock = threading.RLock()


def cache_folder() -> Path:
    """Where machine code is kept: BACKRAZOR_CACHE_DIR, else ``backrazor`` in XDG_CACHE_HOME or in ~/.cache."""
    named = os.environ.get("BACKRAZOR_CACHE_DIR")
    if named:
        return Path(named).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "backrazor"


@cache
def is_writable(folder: Path) -> bool:
    """Whether files can be kept there; makes the folder."""
    if not folder.is_absolute():  # "~" stays as it is where nobody's home is known
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


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
def source_digest() -> str:
    """Names the state of all sources that CPU kernels are made of."""
    sources = sorted({file for pattern in _CPU_SOURCES for file in KERNELS.glob(pattern)})
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


def _file(name: str) -> Path:
    """Of these sources, this Numba and this processor, so that none finds, or overwrites, what another has left."""
    processor = hashlib.sha256(repr(target()).encode()).hexdigest()[:12]
    return cache_folder() / f"cpu-{source_digest()}-numba-{numba.__version__}" / f"{name}-{processor}.code"


@intrinsic
def _pointee(typingctx, pointer):
    """The record at a pointer, without a copy."""
    announce_once()  # Numba asks for the type when it compiles an entry point, not when it loads one
    record = pointer.dtype

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(record))

    return record(pointer), codegen


def _template(pointer):
    WORKER(_pointee(pointer), *SETTINGS)  # noqa: F821 (globals of each entry point)


def _name(worker: Callable[..., None], settings: tuple[int, ...]) -> str:
    """Of an entry point: families call their workers alike."""
    return "_".join(map(str, (*worker.__module__.split("."), worker.__name__, *settings)))


def compiled(worker: Callable[..., None], block: type[Arguments], settings: tuple[int, ...]) -> tuple[str, str]:
    """The name of a C function of one pointer to a ``block``, which runs ``worker(arguments, *settings)``, and its
    optimised LLVM code."""
    own = {"WORKER": worker, "SETTINGS": settings, "_pointee": _pointee, "__name__": __name__}
    function = python_types.FunctionType(_template.__code__, own, worker.__name__)
    function.__qualname__ = _name(worker, settings)
    signature = types.void(types.CPointer(block.record))
    made = numba.cfunc(signature, error_model="numpy")(function)
    return made.native_name, made.inspect_llvm()


@cache
def entry_point(worker: Callable[..., None], block: type[Arguments], settings: tuple[int, ...]) -> int:
    """The address of that function; compiled, or loaded from disk, at first use."""
    keep = is_writable(cache_folder())
    file = _file(_name(worker, settings))
    with _lock:
        kept = objects.read(file) if keep else None
        if kept is None:
            name, code = compiled(worker, block, settings)
            kept = name, objects.object_of(code)
            if keep:
                with suppress(OSError):  # a disk that is full, say
                    objects.write(file, *kept)
        return objects.load(*kept)
