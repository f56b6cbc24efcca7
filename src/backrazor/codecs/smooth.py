"""The smooth activations: forward, derivative, and the table that quantises the derivative."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._guards import detect_fake_mode
from torch.nn import functional as F


@dataclass(frozen=True)
class Activation:
    """A smooth activation: its forward in PyTorch, its derivative in float64 NumPy, and the gradient PyTorch itself
    computes."""

    forward: Callable[[Tensor], Tensor]
    derivative: Callable[[np.ndarray], np.ndarray]
    backward: Callable[[Tensor, Tensor], Tensor]


def _normal_density(x: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_derivative(x: np.ndarray) -> np.ndarray:
    error = np.vectorize(math.erf)(x / math.sqrt(2))
    return 0.5 * (1 + error) + x * _normal_density(x)


def _gelu_tanh_derivative(x: np.ndarray) -> np.ndarray:
    c = math.sqrt(2 / math.pi)
    t = np.tanh(c * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)


def _silu_derivative(x: np.ndarray, slope: float = 1.0) -> np.ndarray:
    s = 1 / (1 + np.exp(-slope * x))
    return s * (1 + slope * x * (1 - s))


def _hardswish_derivative(x: np.ndarray) -> np.ndarray:
    return np.where(x <= -3, 0.0, np.where(x >= 3, 1.0, (2 * x + 3) / 6))


def _quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * x)
    return grad * (s + 1.702 * x * s * (1 - s))


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(F.gelu, _gelu_derivative, torch.ops.aten.gelu_backward),
    "gelu_tanh": Activation(
        lambda x: F.gelu(x, approximate="tanh"),
        _gelu_tanh_derivative,
        lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    ),
    "silu": Activation(F.silu, _silu_derivative, torch.ops.aten.silu_backward),
    "quick_gelu": Activation(
        lambda x: x * torch.sigmoid(1.702 * x), lambda x: _silu_derivative(x, 1.702), _quick_gelu_backward
    ),
    "hardswish": Activation(F.hardswish, _hardswish_derivative, torch.ops.aten.hardswish_backward),
}

_GRID = np.linspace(-6.0, 6.0, 1537)  # cells of 1/128


def quantiser(name: str, bits: int) -> tuple[Tensor, Tensor]:
    """(thresholds (2^bits - 1,), levels (2^bits,)) float32 for the derivative of activation ``name``.

    8 bits: an even grid about zero whose step is a power of two, so that a kernel finds the interval by one exact
        multiplication: 1/32 (to +-4), or 1/16 (to +-8) where the derivative goes flat late, as SiLU's does. 4 and 2
        bits: the piecewise-constant fit of least squared error for x normal with deviation 1.5, found exactly by
        dynamic programming over a grid of 1/128. Each level is the weighted mean of its interval, so that the error has
        no bias (the outermost intervals' mean is taken up to twice the last threshold; +-6 for 4 and 2 bits).
    """
    thresholds, levels = _fit(name, bits)
    return torch.from_numpy(thresholds), torch.from_numpy(levels)


def quantiser_on(name: str, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``quantiser`` on a device, made there once."""
    thresholds, levels = _on_device(quantiser, name, bits, device)
    return thresholds, levels


def outputs(name: str, bits: int) -> Tensor:
    """(2^bits,) float32: the mean output of activation ``name`` in each interval of its ``quantiser``, for x normal
    with deviation 1."""
    return torch.from_numpy(_outputs(name, bits))


def _outputs_alone(name: str, bits: int) -> tuple[Tensor, ...]:
    return (outputs(name, bits),)


def outputs_on(name: str, bits: int, device: torch.device) -> Tensor:
    """``outputs`` on a device, made there once."""
    return _on_device(_outputs_alone, name, bits, device)[0]


@_disable_dynamo  # it would trace through the cache
def _on_device(
    table: Callable[[str, int], tuple[Tensor, ...]], name: str, bits: int, device: torch.device
) -> tuple[Tensor, ...]:
    """``table(name, bits)`` there: on a GPU a copy from the host waits for the device, and a CUDA graph cannot hold
    one. Fake tensors are not kept."""
    make = _resident.__wrapped__ if detect_fake_mode() is not None else _resident
    return make(table, name, bits, device)


@cache
def _resident(
    table: Callable[[str, int], tuple[Tensor, ...]], name: str, bits: int, device: torch.device
) -> tuple[Tensor, ...]:
    return tuple(part.to(device) for part in table(name, bits))


@cache
def _outputs(name: str, bits: int) -> np.ndarray:
    middle = (_GRID[1:] + _GRID[:-1]) / 2
    value = np.concatenate([np.zeros(1), np.cumsum(ACTIVATIONS[name].derivative(middle) * np.diff(_GRID))])
    value -= value[len(_GRID) // 2]  # each is 0 at 0
    value, weight = (value[1:] + value[:-1]) / 2, np.exp(-0.5 * middle**2) + 1e-6
    edges = np.searchsorted(_GRID, [-6.0, *_fit(name, bits)[0].astype(float), 6.0])
    return np.array([np.average(value[a:b], weights=weight[a:b]) for a, b in pairwise(edges)], dtype=np.float32)


@cache  # of arrays: tensors first made under ``predict`` would be fake ones for good
def _fit(name: str, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The arrays behind ``quantiser``, float32."""
    if bits == 8:
        step = 1 / 16 if name in ("silu", "quick_gelu") else 1 / 32
        grid = np.arange(-256 * 16, 256 * 16 + 1) * (step / 16)
        value, weight = _weighed(name, grid)
        edges = np.array([0, *range(129 * 16, 384 * 16, 16), len(value)])  # the outermost two reach twice as far
    else:
        grid = _GRID
        value, weight = _weighed(name, grid)
        edges = _segment(value, weight, 2**bits)
    levels = [np.average(value[a:b], weights=weight[a:b]) for a, b in pairwise(edges)]
    return grid[edges[1:-1]].astype(np.float32), np.array(levels, dtype=np.float32)


def _weighed(name: str, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The derivative in the middle of each cell of ``grid``, and how much the cell counts."""
    x = (grid[1:] + grid[:-1]) / 2
    return ACTIVATIONS[name].derivative(x), np.exp(-0.5 * (x / 1.5) ** 2) + 1e-6  # the floor keeps far cells meaningful


def _segment(value: np.ndarray, weight: np.ndarray, count: int) -> np.ndarray:
    """Edges (count + 1,) of the ``count`` runs of cells with the least weighted squared error around their means."""
    zero = np.zeros(1)
    w = np.concatenate([zero, np.cumsum(weight)])
    wv = np.concatenate([zero, np.cumsum(weight * value)])
    wvv = np.concatenate([zero, np.cumsum(weight * value * value)])
    start, stop = np.meshgrid(np.arange(len(w)), np.arange(len(w)), indexing="ij")
    mass = w[stop] - w[start]
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = np.where(stop > start, (wvv[stop] - wvv[start]) - (wv[stop] - wv[start]) ** 2 / mass, np.inf)
    best, choices = cost[0], []
    for _ in range(count - 1):
        total = best[:, None] + cost
        choices.append(total.argmin(axis=0))
        best = total.min(axis=0)
    edges = [len(value)]
    for choice in reversed(choices):
        edges.append(int(choice[edges[-1]]))
    return np.array([0, *reversed(edges)])
