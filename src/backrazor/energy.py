"""How much of each layer's input survives its packing: one forward, as it is, looked at layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .codecs import Use, pack_shared
from .functional.common import sample_chunks
from .hooks import passive
from .nn.base import DropIn


@dataclass(frozen=True)
class EnergyRow:
    """One layer's input x and what backward reads instead, x_hat.

    ``kept_energy``: 1 - |x - x_hat|^2 / |x|^2, which is |x_hat|^2 / |x|^2 where kept values are exact and the others
    zero; NaN for an x of zeros. ``sparsity``: share of the elements of which nothing is stored: x_hat reads zero there,
    or a guess that others share.
    """

    module: str
    kept_energy: float
    sparsity: float


class Energy:
    """What was seen of each layer inside the context; a layer that ran several times counts them all."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    @property
    def rows(self) -> list[EnergyRow]:
        """One row per layer, in the order of the forward pass. Reads the device once."""
        if not self._sums:
            return []
        device = next(iter(self._sums.values())).device
        sums = torch.stack([row.to(device) for row in self._sums.values()]).tolist()
        return [
            EnergyRow(name, 1 - lost / whole if whole else float("nan"), zeros / count)
            for name, (whole, lost, zeros, count) in zip(self._sums, sums, strict=True)
        ]

    @torch.no_grad()
    def _see(self, name: str, module: DropIn, arguments: tuple[Tensor, ...]) -> None:
        (x, *_) = arguments
        weight = getattr(module, "weight", None)  # a drop-in that packs something else may have none
        if weight is None or not weight.requires_grad or not x.numel():
            return
        given = x
        if x.dim() < (4 if isinstance(module, nn.Conv2d) else 2):
            x = x.unsqueeze(0)
        # What the layer itself has packed a moment ago, wherever the graph still holds it.
        packed = pack_shared(x, module.razor.pruned, Use.of(weight), module.flag_for(x), given)
        sums = torch.zeros(4, dtype=torch.float64, device=x.device)
        for start, stop in sample_chunks(len(x), packed.form.sample_numel * 4, x.device):
            x_hat = packed.unpack(start, stop, torch.float32)
            parts = (
                _energy(x[start:stop]),
                _energy(x_hat - x[start:stop]),
                x_hat.numel() - packed.form.own_values(packed.tensors, x_hat, start, stop),
                x_hat.new_tensor(x_hat.numel()),
            )
            sums += torch.stack([part.double() for part in parts])
        self._sums[name] = self._sums.get(name, 0) + sums


def _energy(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float32).double().square()


@contextmanager
def kept_energy(model: nn.Module) -> Iterator[Energy]:
    """See what every pruning layer of a razored model keeps: ``with kept_energy(model) as energy: loss = ...``.

    Covers Linear and convolution layers whose weight trains: their input is what is packed. The forward, its gradients
    and the random numbers it draws are those without this context. Costs one unpacking per layer, so use it at
    the steps that are logged. ``energy.rows`` may be read at any time after.
    """
    energy = Energy()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, DropIn) and module.prunes:
                stack.callback(module.register_forward_hook(passive(partial(_hook, energy, name))).remove)
        yield energy


def _hook(energy: Energy, name: str, module: DropIn, arguments: tuple[Tensor, ...], _output: Tensor) -> None:
    if torch.is_grad_enabled():  # nothing is packed without
        energy._see(name, module, arguments)
