"""glibc's allocator, told to keep what is freed."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)


def keep_freed_memory() -> None:
    """No mmap of large blocks, no trimming of the heap.

    Raises:
        OSError: the C library takes no such setting.
    """
    for parameter, value in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, (1 << 31) - 1)):
        if ctypes.CDLL(None).mallopt(parameter, value) != 1:
            raise OSError("this C library's mallopt refuses the setting")
