"""How many CUDA kernels a piece of work launches, counted on a machine without a GPU.

The work runs on fake tensors, which have shapes and no data. An operator of PyTorch that computes counts as one launch.
An operator of this library counts as what its host code for CUDA launches on tensors of those shapes, the operators of
PyTorch in it included.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from backrazor.kernels import dispatch
from backrazor.kernels.operators import HOST_CODE

from . import ahead

_FREE = re.compile(
    r"empty|_unsafe_view|_reshape_alias|aten\.detach|aten\.lift_fresh"
)  # allocate or rename, move nothing


def computes(function: torch._ops.OpOverload) -> bool:
    """Whether an operator of PyTorch launches a kernel: it makes no view and does more than allocate."""
    return function.namespace == "aten" and not function.is_view and not _FREE.search(str(function))


def _asks(module: ModuleType) -> bool:
    """Whether a module asks if a device is CUDA."""
    return vars(module).get("on_cuda") is dispatch.on_cuda


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Work on fake tensors of any device takes the path of CUDA: its chunks, its kernels."""
    asking = [module for name, module in sys.modules.items() if name.startswith("backrazor.") and _asks(module)]
    with ExitStack() as patches:
        for module in asking:
            patches.enter_context(mock.patch.object(module, "on_cuda", lambda device: True))
        patches.enter_context(mock.patch.object(dispatch, "_choice", lambda device: "triton"))
        yield


class HostWork(NamedTuple):
    """Kernels of this library, and how many of PyTorch's."""

    launches: tuple[ahead.Launch, ...]
    others: int


class Launches(TorchDispatchMode):
    """Launches by operator, of what runs while the mode is on."""

    def __init__(self, device: str | None = None) -> None:
        """``device``: of the tensors that count, all by default."""
        super().__init__()
        self._device = device
        self.by_operator: Counter[str] = Counter()
        self._known: dict[str, HostWork] = {}

    @property
    def total(self) -> int:
        return self.by_operator.total()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        if function.namespace == "backrazor":
            self.note(function, args, kwargs, result, self.of_operator(function, args, kwargs))
        elif computes(function) and self._counts(result):
            self.note(function, args, kwargs, result, 1)
        return result

    def note(self, function: torch._ops.OpOverload, args: tuple, kwargs: dict, result: object, launches: int) -> None:
        """Called for every operator that launches something."""
        self.by_operator[str(function)] += launches

    def _counts(self, result: object) -> bool:
        """Whether an operator makes a tensor where the work is: host code also makes numbers on the CPU."""
        devices = {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        return bool(devices) and (self._device is None or self._device in devices)

    def of_operator(self, function: torch._ops.OpOverload, args: tuple, kwargs: dict) -> int:
        """Of one call of an operator of this library."""
        work = self.work_of_operator(function, args, kwargs)
        return len(work.launches) + work.others

    def work_of_operator(self, function: torch._ops.OpOverload, args: tuple, kwargs: dict) -> HostWork:
        """What the host code of one call of an operator of this library launches."""
        with unset_fake_temporarily():
            args, kwargs = tree_map_only(Tensor, _without_data, (args, kwargs))
            key = repr((function, tree_map_only(Tensor, _description, (args, kwargs))))
            if key not in self._known:
                self._known[key] = _of_host_code(function, args, kwargs)
        return self._known[key]


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _description(tensor: Tensor) -> tuple:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def _of_host_code(function: torch._ops.OpOverload, args: tuple, kwargs: dict) -> HostWork:
    with as_on_cuda(), ahead.recording() as launched, Launches("meta") as others:
        HOST_CODE[function._schema.name.removeprefix("backrazor::")](*args, **kwargs)
    return HostWork(tuple(launched), others.total)
