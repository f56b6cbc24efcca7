"""One entry point for each worker, argument block and choice of settings: loaded from disk, else compiled and kept.

A worker is named, not imported: its module brings Numba, which only compiling needs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import NamedTuple

from . import objects
from .arguments import Arguments
from .kept import cache_folder, file_of, is_writable

_lock = threading.RLock()


class Worker(NamedTuple):
    """The module of a kernel's worker, and the function there: ``worker(arguments, *settings)``."""

    module: str
    name: str

    def function(self) -> Callable[..., None]:
        """The worker itself; imports Numba."""
        return getattr(import_module(self.module), self.name)


EntryPoint = tuple[Worker, type[Arguments], tuple[int, ...]]  # what ``entry_point`` takes


def name_of(worker: Worker, settings: tuple[int, ...]) -> str:
    """Of an entry point: families call their workers alike."""
    return "_".join(map(str, (*worker.module.split("."), worker.name, *settings)))


@cache
def entry_point(worker: Worker, block: type[Arguments], settings: tuple[int, ...]) -> int:
    """The address of a C function of one pointer to a ``block``, which runs ``worker(arguments, *settings)``; compiled,
    or loaded from disk, at first use."""
    keep = is_writable(cache_folder())
    name = name_of(worker, settings)
    with _lock:
        kept = objects.read(file_of(name)) if keep else None
        if kept is None:
            from .compiling import machine_code

            kept = machine_code(worker.function(), block, settings, name)
            if keep:
                with suppress(OSError):  # a disk that is full, say
                    objects.write(file_of(name), *kept)
        return objects.load(*kept)
