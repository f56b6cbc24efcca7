"""Data that kernels have to survive, by name: (shape, dtype, generator) -> tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _with_non_finite(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    x = _normal(shape, generator)
    flat = x.view(-1)
    for step, value in ((3, float("nan")), (5, float("inf")), (7, -float("inf"))):
        flat[step - 1 :: step * 11] = value
    return x


def _mostly_zero(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    x = _normal(shape, generator)
    return x * (torch.rand(shape, generator=generator) < 0.02)


DATA: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "normal": _normal,
    "relu": lambda shape, g: _normal(shape, g).relu(),
    "zeros": lambda shape, g: torch.zeros(shape),
    "all equal": lambda shape, g: torch.full(shape, -1.5),
    "clamped at 6": lambda shape, g: (_normal(shape, g) * 6).clamp(0, 6),
    "small integers": lambda shape, g: torch.randint(-3, 4, shape, generator=g).float(),
    "mostly zero": _mostly_zero,
    "NaN and Inf": _with_non_finite,
    "overflow": lambda shape, g: _normal(shape, g) * 1e38,
    "subnormal": lambda shape, g: _normal(shape, g) * 1e-39,
}


def sample(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """The named data as ``dtype``."""
    return DATA[name](shape, torch.Generator().manual_seed(seed)).to(dtype)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values (B, ...) in several memory layouts."""
    found = {"contiguous": x.contiguous()}
    if x.dim() == 4:
        found["channels_last"] = x.contiguous(memory_format=torch.channels_last)
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), 77.0)
    wide[..., ::2] = x
    found["sliced"] = wide[..., ::2]
    batch = x.new_full((2 * x.shape[0] + 1, *x.shape[1:]), 77.0)
    batch[1::2] = x
    found["every second sample"] = batch[1::2]
    if x.dim() > 2:
        found["transposed"] = x.transpose(1, 2).contiguous().transpose(1, 2)
    return found
