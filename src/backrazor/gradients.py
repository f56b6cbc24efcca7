"""How far the gradients of a razored model are from the dense ones: one backward each, same weights, batch and random
numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import RazorConfig
from .convert import razor_, unrazor_


@dataclass(frozen=True)
class GradientRow:
    """One parameter (or ``name`` "overall" for all of them): cosine of the razored gradient to the dense one, its norm
    relative to the dense norm, and the dense norm. All from float64 sums. NaN where the dense gradient is zero."""

    name: str
    cosine: float
    relative_norm: float
    dense_norm: float


@dataclass(frozen=True)
class GradientComparison:
    """The gradients of one batch, razored beside dense. ``dense_loss`` and ``loss`` are equal up to the attention
    kernel's rounding."""

    config: RazorConfig
    rows: tuple[GradientRow, ...]
    overall: GradientRow
    dense_loss: float
    loss: float
    _sums: dict[str, tuple[float, float, float]]

    @property
    def cosine(self) -> float:
        """Of the whole gradient."""
        return self.overall.cosine

    def by_layer(self, group: Callable[[str], str] = lambda name: name.rpartition(".")[0]) -> tuple[GradientRow, ...]:
        """Rows of parameters grouped by ``group`` of their name: by default the module that owns them."""
        totals: dict[str, tuple[float, float, float]] = {}
        for name, sums in self._sums.items():
            key = group(name)
            before = totals.get(key, (0.0, 0.0, 0.0))
            totals[key] = before[0] + sums[0], before[1] + sums[1], before[2] + sums[2]
        return tuple(_row(name, sums) for name, sums in totals.items())

    def table(self) -> str:
        """Lines for a person: one per layer, in the order of the model, the whole gradient last."""
        lines = [f"gradients under {self.config.describe()}", f"{'cosine':>8} {'norm':>8} {'dense norm':>11}  layer"]
        rows = (*self.by_layer(), self.overall)
        lines += [f"{row.cosine:8.4f} {row.relative_norm:8.4f} {row.dense_norm:11.3e}  {row.name}" for row in rows]
        return "\n".join(lines)

    __str__ = table


def compare_gradients(
    model: nn.Module, inputs: Tensor, loss_fn: Callable[[Tensor], Tensor], config: RazorConfig | None = None
) -> GradientComparison:
    """Run ``loss_fn(model(inputs)).backward()`` dense and razored by ``config`` (default: compact), and compare the
    parameters' gradients.

    Both passes work on copies, so that the model, its ``.grad``, running statistics and the CPU's and devices' random
    state come back untouched; both draw the same random numbers. A model that is razored already is compared as
    ``config`` would razor it.

    Raises:
        ValueError: no parameter requires a gradient, or nothing in the model can be razored.
    """
    config = RazorConfig() if config is None else config
    dense_loss, dense = _gradients(model, inputs, loss_fn, None)
    if not dense:
        raise ValueError(
            f"no parameter of {type(model).__name__} received a gradient: set requires_grad on what is to be trained"
        )
    loss, razored = _gradients(model, inputs, loss_fn, config)
    sums = {name: _sums(gradient, razored[name]) for name, gradient in dense.items()}
    rows = tuple(_row(name, values) for name, values in sums.items())
    overall = _row("overall", tuple(sum(column) for column in zip(*sums.values(), strict=True)))
    return GradientComparison(config, rows, overall, dense_loss, loss, sums)


def _gradients(
    model: nn.Module, inputs: Tensor, loss_fn: Callable[[Tensor], Tensor], config: RazorConfig | None
) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradient of every parameter that received one, on a copy under its own random state."""
    twin = copy.deepcopy(model)
    unrazor_(twin)
    twin.zero_grad(set_to_none=True)
    if config is not None:
        razor_(twin, config)
    devices = sorted({t.device.index for t in (inputs, *twin.parameters()) if t.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        loss = loss_fn(twin(inputs))
        loss.backward()
    return loss.item(), {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


def _sums(dense: Tensor, razored: Tensor) -> tuple[float, float, float]:
    """(dense . razored, dense . dense, razored . razored) in float64."""
    dense, razored = dense.double().flatten(), razored.double().flatten()
    return float(dense @ razored), float(dense @ dense), float(razored @ razored)


def _row(name: str, sums: tuple[float, float, float]) -> GradientRow:
    product, dense, razored = sums
    scale = (dense * razored) ** 0.5
    cosine = product / scale if scale else float("nan")
    return GradientRow(name, cosine, (razored / dense) ** 0.5 if dense else float("nan"), dense**0.5)
