"""Running a CPU kernel on PyTorch's own threads.

A kernel is a C function of one pointer to a block of int64 arguments; word 0 of the block is a counter from which the
threads take the next piece of work. The team is started through the OpenMP runtime that PyTorch has already loaded
(``GOMP_parallel``): a second thread pool would fight with PyTorch's, whose workers spin for a while after every
operator. Where no such runtime is found the kernel runs on Python threads (the call releases the GIL).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numba
import torch

_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _gomp_parallel():
    """The entry point of the OpenMP runtime in this process, or None."""
    for name in ("libgomp.so.1", "libomp.so", "libiomp5.so"):
        try:
            library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)  # only if it is loaded already
            function = library.GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        function.restype = None
        return function
    return None


@cache
def _thread_pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="backrazor")


@cache
def _callable(address: int):
    return _KERNEL(address)


def threads_for(tasks: int) -> int:
    """How many threads ``launch`` uses: as many scratch slots are needed."""
    return max(min(torch.get_num_threads(), tasks), 1)


@cache
def _digest() -> str:
    """Names the state of all kernel sources."""
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


@cache
def _compile(kernel: Callable[[int], None]) -> int:
    """Address of the machine code of ``kernel``; compiled at first use, then kept in Numba's cache on disk.

    The name there changes with the sources: Numba itself looks at the kernel's own file alone, not at what is inlined.
    """
    kernel.__qualname__ = f"{kernel.__name__}_{_digest()}"
    signature = numba.types.void(numba.types.int64)
    return numba.cfunc(signature, cache=True, error_model="numpy")(kernel).address


def launch(kernel: Callable[[int], None], arguments: list[int], tasks: int) -> None:
    """Run ``kernel`` over ``tasks`` pieces of work with up to ``torch.get_num_threads()`` threads.

    ``arguments`` (ints; addresses and sizes) follow the counter in the argument block. Returns when all pieces are
    done.
    """
    kernel_address = _compile(kernel)
    block = (ctypes.c_int64 * (len(arguments) + 1))(0, *arguments)
    pointer = ctypes.addressof(block)
    threads = threads_for(tasks)
    if threads == 1:
        _callable(kernel_address)(pointer)
        return
    parallel = _gomp_parallel()
    if parallel is not None:
        parallel(kernel_address, pointer, threads, 0)
        return
    function = _callable(kernel_address)
    futures = [_thread_pool(threads).submit(function, pointer) for _ in range(threads)]
    for future in futures:
        future.result()
