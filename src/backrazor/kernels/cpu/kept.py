"""Where machine code is kept, and under which names. Numba is asked for its version alone, and not imported."""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cache
from importlib import import_module, metadata
from pathlib import Path

from .target import processor

KERNELS = Path(__file__).resolve().parents[1]
_CPU_SOURCES = ("cpu/*.py", "*/cpu.py", "*/_cpu_*.py", "*/layout.py")


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
def source_digest() -> str:
    """Names the state of all sources that CPU kernels are made of."""
    sources = sorted({file for pattern in _CPU_SOURCES for file in KERNELS.glob(pattern)})
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


@cache
def version(package: str) -> str:
    """Of what is installed.

    Raises:
        ImportError: it is not, or it does not start where only itself knows.
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return import_module(package).__version__


@cache
def _maker() -> str:
    """Names the processor, and what Numba stands on: whether it starts depends on these."""
    parts = processor(), version("llvmlite"), version("numpy")
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _folder() -> Path:
    return cache_folder() / f"cpu-{source_digest()}-numba-{version('numba')}"


def file_of(name: str) -> Path:
    """Of these sources, this Numba and this processor, so that none finds, or overwrites, what another has left."""
    return _folder() / f"{name}-{_maker()}.code"


def has_any() -> bool:
    """Whether a process like this one, of the same versions and on the same processor, has kept a kernel before."""
    return is_writable(cache_folder()) and next(_folder().glob(f"*-{_maker()}.code"), None) is not None
