"""Triton's interpreter, made strict: guard bands around every buffer of every launch, programs in an order of choice.

A kernel never sees a caller's tensor: each launch gets copies that lie between two bands of 0xFF bytes (NaN as any
float type, -1 or 255 as an integer), and the copies go back when all programs have run. A store outside a buffer harms
a band and is an error; a load outside one brings NaN or the largest integer, which a comparison with the reference
shows.
"""

from __future__ import annotations

import random

import numpy
import torch
from torch import Tensor
from triton.runtime import interpreter

BAND_BYTES = 4096
ORDERS = ("forward", "backward", "shuffled", "odd first")
_builder = interpreter.interpreter_builder
_set_grid_idx = _builder.set_grid_idx


class _Guarded:
    """A copy of the contiguous ``tensor`` between two bands."""

    def __init__(self, tensor: Tensor) -> None:
        assert tensor.is_contiguous(), f"a kernel was handed strides {tensor.stride()}"
        size = tensor.numel() * tensor.element_size()
        self._room = torch.full((BAND_BYTES + size + BAND_BYTES,), 0xFF, dtype=torch.uint8)
        self._inside = self._room[BAND_BYTES : BAND_BYTES + size]
        self._original = tensor
        self.tensor = self._inside.view(tensor.dtype).view(tensor.shape)
        self.tensor.copy_(tensor)

    def give_back(self, name: str) -> None:
        """Copy the result to the caller's tensor.

        Raises:
            MemoryError: a band is not as it was.
        """
        bands = {"before": self._room[:BAND_BYTES], "past": self._room[BAND_BYTES + len(self._inside) :]}
        for where, band in bands.items():
            if not bool((band == 0xFF).all()):
                raise MemoryError(f"a program stored {where} {name} of shape {tuple(self.tensor.shape)}")
        before = self._original.detach().reshape(-1).view(torch.uint8)
        if not torch.equal(before, self._inside):  # what was only read keeps its version: autograd watches it
            self._original.copy_(self.tensor)


def _permutation(order: str, programs: int, seed: int) -> list[int]:
    numbers = list(range(programs))
    if order == "backward":
        numbers.reverse()
    elif order == "shuffled":
        random.Random(seed).shuffle(numbers)
    elif order == "odd first":
        numbers = numbers[1::2] + numbers[::2]
    return numbers


class StrictExecutor(interpreter.GridExecutor):
    """Stands in for the interpreter's executor. ``order`` is the order of programs; ``launches`` counts launches and
    ``programs`` the most programs of one. ``last_only`` runs the last program of each launch alone, on the tensors
    themselves: for tensors too large to copy."""

    order = "forward"
    last_only = False
    launches = 0
    programs = 0

    def __call__(self, *args: object, **kwargs: object) -> None:
        guarded: dict[tuple[int, int], _Guarded] = {}
        strict = type(self)

        def guard(argument: object) -> object:
            if not isinstance(argument, Tensor) or strict.last_only:
                return argument
            key = argument.data_ptr(), argument.numel() * argument.element_size()
            if argument.numel() == 0:  # empty tensors may share an address: each gets bands of its own
                key = id(argument), 0
            if key not in guarded:
                guarded[key] = _Guarded(argument)
            return guarded[key].tensor.view(argument.dtype).view(argument.shape)

        (programs,) = self.grid
        strict.launches += 1
        strict.programs = max(strict.programs, programs)
        places = _permutation(strict.order, programs, strict.launches)
        if strict.last_only:
            places, self.grid = [programs - 1], (1,)
        _builder.set_grid_idx = lambda x, y, z: setattr(_builder, "grid_idx", (places[x], y, z))
        try:
            with numpy.errstate(all="ignore"):  # the interpreter computes in NumPy, which tells of every NaN
                super().__call__(*(guard(argument) for argument in args), **kwargs)
        finally:
            _builder.set_grid_idx = _set_grid_idx
        for number, buffer in enumerate(guarded.values()):
            buffer.give_back(f"buffer {number} of {self.fn.__name__}")

    def _restore_args_dev(self, *_: object) -> None:
        """The kernels ran on the tensors themselves: nothing to copy."""
