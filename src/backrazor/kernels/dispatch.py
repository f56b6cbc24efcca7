"""Which implementation of the primitives runs: by device, or forced by the environment variable BACKRAZOR_KERNELS.

CUDA tensors take Triton, CPU tensors Numba; what neither covers (other devices, float64, a package that is missing, a
processor or an accelerator without what the kernels need) takes the reference.
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

from .cuda_target import shortcoming as cuda_shortcoming

_MODULES = {"numba": "cpu", "triton": "triton", "interpret": "triton"}
_DEVICES = {"numba": "cpu", "interpret": "cpu"}  # the only tensors that a forced implementation takes
_USUAL = {"cpu": "numba", "cuda": "triton"}
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
def _runs(choice: str) -> bool:
    """Whether the kernels called ``choice`` run in this process; warns where they do not.

    Raises:
        ValueError: they do not, and BACKRAZOR_KERNELS forces them.
    """
    if choice == "numba":
        from .cpu.target import shortcoming

        reason = shortcoming()
    else:
        reason = cuda_shortcoming() if choice == "triton" else None
    if reason is None:
        return True
    if forced() == choice:
        raise ValueError(f"BACKRAZOR_KERNELS={choice!r} cannot run: {reason}; or unset it")
    _warn_of_reference(reason)
    return False


def _warn_of_reference(reason: str) -> None:
    warnings.warn(f"backrazor takes its slower kernels in plain PyTorch: {reason}", RuntimeWarning, stacklevel=3)


@cache
def _other_device(device: str) -> None:
    """Say once that a device has no kernels of its own."""
    _warn_of_reference(f"there are none for the device {device}, only for CPUs and NVIDIA GPUs")


def triton_by_name() -> bool:
    """Whether BACKRAZOR_KERNELS asks for the Triton kernels, which switches on those that round otherwise than
    PyTorch."""
    return forced() in ("triton", "interpret")


def on_cuda(device: torch.device) -> bool:
    """Whether work there is cut as suits a GPU. Asked in one place, so that a step's launches can be counted without
    one."""
    return device.type == "cuda"


@_disable_dynamo  # it would trace through the caches
def implementation(family: str, tensor: torch.Tensor) -> ModuleType | None:
    """The fast module of a kernel folder for this tensor, or None where the reference has to do: some folders have no
    version for the CPU.

    Raises:
        ValueError: BACKRAZOR_KERNELS is wrong, or forces an implementation that cannot run on the tensor's device.
    """
    choice = _choice(tensor.device.type)
    if choice is None or tensor.dtype not in _FAST_DTYPES or not _runs(choice):
        return None
    return _module(f"backrazor.kernels.{family}.{_MODULES[choice]}")


def _choice(device: str) -> str | None:
    """The name of the implementation for tensors of this device, None for the reference."""
    choice = forced()
    if choice in (None, "triton"):  # "triton" is about CUDA tensors: all others go where they always go
        if device not in (*_USUAL, "meta"):
            _other_device(device)
        usual = _USUAL.get(device)
        return usual if usual is not None and _installed(usual) else None
    if choice == "reference":
        return None
    if device != _DEVICES[choice]:
        raise ValueError(
            f"BACKRAZOR_KERNELS={choice!r} runs on {_DEVICES[choice]} tensors, not on {device}: "
            "unset it or move the model"
        )
    return choice


@cache
def _module(name: str) -> ModuleType | None:
    return import_module(name) if importlib.util.find_spec(name) else None
