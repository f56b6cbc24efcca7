"""The meters of a process's memory on the CPU: its resident set, and the highest it has been. Linux; bytes."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path


def resident_bytes() -> int:
    """The resident set of this process (Linux)."""
    return _status("VmRSS")


def high_water_mark() -> int:
    """The largest resident set since ``reset_high_water_mark`` (Linux)."""
    return _status("VmHWM")


def reset_high_water_mark() -> int:
    """Give free memory back, set the high-water mark to the current resident set and return that.

    Raises:
        OSError: not Linux, or the kernel refuses to reset the mark.
    """
    if not sys.platform.startswith("linux"):
        raise OSError(
            f"peak memory on the CPU is read from /proc, which {sys.platform} lacks: measure on Linux or on CUDA"
        )
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes()


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
