"""From a worker to machine code: one entry point for each worker, argument block and choice of settings.

Settings (the kind of element, the width of a code) are numbers that are constant in an entry point, so LLVM prunes what
they rule out, and one source serves all. Numba keeps the code on disk, in ``cache_folder()``; its name there holds the
state of all CPU sources, since Numba itself looks at one file alone and not at what is inlined.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import threading
import types as python_types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numba
from numba.core import config, types
from numba.extending import intrinsic

from .arguments import Arguments

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


def _state_folder() -> Path:
    """Of these sources and this Numba, so that neither finds, or overwrites, what another has left."""
    return cache_folder() / f"cpu-{source_digest()}-numba-{numba.__version__}"


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


@contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """Numba's setting for all of a process, put back at once."""
    before = config.CACHE_DIR
    config.CACHE_DIR = str(folder)
    try:
        yield
    finally:
        config.CACHE_DIR = before


def compiled(worker, block: type[Arguments], settings: tuple[int, ...], keep: bool):
    """Numba's C function of one pointer to a ``block``, which runs ``worker(arguments, *settings)``; ``keep``: on
    disk."""
    # no closure: Numba's cache would tell two processes' closures apart
    own = {"WORKER": worker, "SETTINGS": settings, "_pointee": _pointee, "__name__": __name__}
    function = python_types.FunctionType(_template.__code__, own, worker.__name__)
    # names the file and the symbol: families call their workers alike
    function.__qualname__ = "_".join(map(str, (*worker.__module__.split("."), worker.__name__, *settings)))
    signature = types.void(types.CPointer(block.record))
    with _lock, _kept_in(_state_folder()):
        return numba.cfunc(signature, cache=keep, error_model="numpy")(function)


@cache
def entry_point(worker, block: type[Arguments], settings: tuple[int, ...]) -> int:
    """The address of that function; compiled, or loaded from disk, at first use."""
    try:
        return compiled(worker, block, settings, is_writable(cache_folder())).address
    except OSError:  # a disk that is full, say
        return compiled(worker, block, settings, False).address
