"""Functions in fresh processes: a new interpreter whose memory and allocator nothing else has touched.

With ``stable_malloc`` glibc is told to return freed blocks at once (MALLOC_MMAP_THRESHOLD_=65536,
MALLOC_TRIM_THRESHOLD_=65536, one arena): otherwise a high-water mark would include blocks that the allocator kept for
later. That setting makes every large tensor pay page faults.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

_STABLE_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TOP_PAD_": "0",
}


def in_fresh_process(function: Callable, *arguments: object, stable_malloc: bool = False) -> Any:
    """``function(*arguments)`` in a new interpreter; with ``stable_malloc`` freed memory returns to the system at once
    (glibc)."""
    with FreshProcess(_call, function, arguments, stable_malloc=stable_malloc) as process:
        return process.receive()


def _call(connection: Connection, function: Callable, arguments: tuple) -> None:
    connection.send((True, function(*arguments)))


class FreshProcess:
    """A new interpreter that runs ``serve(connection, *arguments)`` and answers over the connection in pairs: whether
    it succeeded, and the answer or the traceback."""

    def __init__(self, serve: Callable, *arguments: object, stable_malloc: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, serve, arguments), daemon=False)
        before = {name: os.environ.get(name) for name in _STABLE_MALLOC}
        try:
            if stable_malloc:
                os.environ.update(_STABLE_MALLOC)  # read by the allocator when the new process starts
            self._process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        other.close()

    def __enter__(self) -> FreshProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._connection.close()
        if kind is not None:
            self._process.terminate()
        self._process.join()

    def ask(self, question: object) -> Any:
        """The answer to ``question``; errors as ``receive``."""
        with suppress(BrokenPipeError, ConnectionResetError):  # ``receive`` tells why
            self._connection.send(question)
        return self.receive()

    def receive(self) -> Any:
        """The next answer.

        Raises:
            RuntimeError: the process failed, or died.
        """
        try:
            succeeded, answer = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise RuntimeError(
                f"the measuring process died with exit code {self._process.exitcode}; out of memory if it is -9"
            ) from None
        if not succeeded:
            raise RuntimeError(f"the measured step failed in its process:\n{answer}")
        return answer


def _serve(connection: Connection, serve: Callable, arguments: tuple) -> None:
    try:
        serve(connection, *arguments)
    except BaseException:
        with suppress(BrokenPipeError):  # nobody listens any more
            connection.send((False, traceback.format_exc()))
