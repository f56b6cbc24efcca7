"""Running a CPU kernel on PyTorch's own threads.

A kernel is a C function of one pointer to its arguments, among which is a counter from which the threads take the next
piece of work. The team is started through the OpenMP runtime that PyTorch has already loaded (``GOMP_parallel``): a
second thread pool would fight with PyTorch's, whose workers spin for a while after every operator. Where no such
runtime is found the kernel runs on Python threads (the call releases the GIL).
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

from .arguments import Arguments
from .entries import Worker, entry_point

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


def launch(worker: Worker, arguments: Arguments, tasks: int, settings: tuple[int, ...] = ()) -> None:
    """Run ``worker(arguments, *settings)`` over ``tasks`` pieces of work with up to ``torch.get_num_threads()``
    threads. Returns when all pieces are done."""
    address = entry_point(worker, type(arguments), settings)
    pointer = ctypes.addressof(arguments)
    threads = threads_for(tasks)
    if threads == 1:
        _callable(address)(pointer)
        return
    parallel = _gomp_parallel()
    if parallel is not None:
        parallel(address, pointer, threads, 0)
        return
    function = _callable(address)
    futures = [_thread_pool(threads).submit(function, pointer) for _ in range(threads)]
    for future in futures:
        future.result()
