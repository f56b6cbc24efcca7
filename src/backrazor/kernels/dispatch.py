"""Which implementation of the primitives runs: by device, or forced by the environment variable BACKRAZOR_KERNELS.

CUDA tensors take Triton, CPU tensors Numba; what neither covers (other devices, float64, a package that is missing, a
processor without what the CPU kernels need) takes the reference.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch._compile import _disable_dynamo

_MODULES = {"numba": "cpu", "triton": "triton", "interpret": "triton"}
_DEVICES = {"numba": "cpu", "triton": "cuda", "interpret": "cpu"}
_FAST_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Triton reads TRITON_INTERPRET when it is imported and when a kernel is defined, and PyTorch imports Triton when the
# first operator runs: no later than here.
if os.environ.get("BACKRAZOR_KERNELS") == "interpret" and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@cache
def forced() -> str | None:
    """The value of BACKRAZOR_KERNELS, checked once; None if unset. "interpret" has switched Triton's interpreter on for
    this process.

    Raises:
        ValueError: the value names no implementation, or one whose package is missing, or the interpreter comes too
            late.
    """
    value = os.environ.get("BACKRAZOR_KERNELS") or None
    if value is None or value == "reference":
        return value
    if value not in _MODULES:
        raise ValueError(
            f"BACKRAZOR_KERNELS={value!r} is not known: unset it or use one of reference, {', '.join(_MODULES)}"
        )
    package = "numba" if value == "numba" else "triton"
    if not _installed(package):
        raise ValueError(
            f"BACKRAZOR_KERNELS={value!r} needs the package {package}, which is missing: install it or unset it"
        )
    if value == "interpret" and not _INTERPRETED:
        raise ValueError(
            "BACKRAZOR_KERNELS='interpret' came after triton was imported: set it before Python starts, and "
            "TRITON_INTERPRET=1 too"
        )
    return value


@cache
def _numba_runs() -> bool:
    """Whether Numba's kernels run here; warns where they do not.

    Raises:
        ValueError: they do not, and BACKRAZOR_KERNELS forces them.
    """
    from .cpu.target import shortcoming

    reason = shortcoming()
    if reason is None:
        return True
    if forced() == "numba":
        raise ValueError(f"BACKRAZOR_KERNELS='numba' cannot run: {reason}; or unset it")
    warnings.warn(f"backrazor takes its slower kernels in plain PyTorch: {reason}", RuntimeWarning, stacklevel=2)
    return False


def triton_by_name() -> bool:
    """Whether BACKRAZOR_KERNELS asks for the Triton kernels, which switches on those that round otherwise than
    PyTorch."""
    return forced() in ("triton", "interpret")


@_disable_dynamo  # it would trace through the caches
def implementation(family: str, tensor: torch.Tensor) -> ModuleType | None:
    """The fast module of a kernel folder for this tensor, or None where the reference has to do: some folders have no
    version for the CPU.

    Raises:
        ValueError: BACKRAZOR_KERNELS is wrong, or forces an implementation that cannot run on the tensor's device.
    """
    choice, device = forced(), tensor.device.type
    if choice is None:
        choice = {"cpu": "numba", "cuda": "triton"}.get(device)
        if choice is None or not _installed(choice):
            return None
    elif choice != "reference" and device != _DEVICES[choice]:
        wanted = _DEVICES[choice]
        raise ValueError(
            f"BACKRAZOR_KERNELS={choice!r} runs on {wanted} tensors, not on {device}: unset it or move the model"
        )
    if choice == "reference" or tensor.dtype not in _FAST_DTYPES:
        return None
    if choice == "numba" and not _numba_runs():
        return None
    return _module(f"backrazor.kernels.{family}.{_MODULES[choice]}")


@cache
def _module(name: str) -> ModuleType | None:
    return import_module(name) if importlib.util.find_spec(name) else None
