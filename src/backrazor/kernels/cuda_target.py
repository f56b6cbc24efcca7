"""Whether the CUDA kernels can run in this process, and what Triton needs before its first launch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch


def shortcoming() -> str | None:
    """What keeps the CUDA kernels from running on what PyTorch calls a CUDA device, in words, or None."""
    if torch.version.hip is not None:
        return f"they are for NVIDIA GPUs, and this PyTorch is built for ROCm {torch.version.hip}"
    return None


def missing_build_tools() -> list[str]:
    """What Triton does not find of what it builds its launcher from, in words. It looks for a compiler where CC says,
    else for gcc and clang, and for the header that comes with Python's development files."""
    named = os.environ.get("CC")
    missing = []
    if named is not None and shutil.which(named) is None:
        missing.append(f"the C compiler CC={named}")
    elif named is None and not (shutil.which("gcc") or shutil.which("clang")):
        missing.append("a C compiler (gcc or clang, or CC)")
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian's own, which has no headers
    header = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    if not header.is_file():
        missing.append(f"{header} (Python's development files)")
    return missing


def build_failure(error: BaseException) -> str | None:
    """In one line what kept Triton from building its launcher, where that is what ``error`` is about, else None. A
    launcher that was built before lies in Triton's cache and needs nothing."""
    built = isinstance(error, OSError | subprocess.CalledProcessError) or "C compiler" in str(error)
    missing = missing_build_tools() if built else []
    if not missing:
        return None
    return (
        f"Triton needs {' and '.join(missing)} to launch its first CUDA kernel: install it, or set "
        "BACKRAZOR_KERNELS=reference"
    )
