"""Which implementation of the primitives runs: by device, or forced by the environment variable BACKRAZOR_KERNELS."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

_FORCED = ("reference", "numba")
_FAST_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def forced() -> str | None:
    """The value of BACKRAZOR_KERNELS, checked once; None if unset.

    Raises:
        ValueError: the value names no implementation.
    """
    value = os.environ.get("BACKRAZOR_KERNELS") or None
    if value is not None and value not in _FORCED:
        raise ValueError(f"BACKRAZOR_KERNELS={value!r} is not known: unset it or use one of {', '.join(_FORCED)}")
    return value


@cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def implementation(family: str, tensor: torch.Tensor) -> ModuleType | None:
    """The fast module of a kernel folder for this tensor, or None where the reference has to do."""
    if forced() == "reference" or tensor.device.type != "cpu" or tensor.dtype not in _FAST_DTYPES or not _has_numba():
        return None
    return import_module(f"backrazor.kernels.{family}.cpu")
