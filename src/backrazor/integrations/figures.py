"""What a callback logs of one training step. Shared by the callbacks; knows none of the frameworks."""

from __future__ import annotations

import math
import warnings
from contextlib import ExitStack

from torch import nn

from ..convert import razor_
from ..energy import Energy, kept_energy
from ..memory import Ledger, ledger
from ..nn.base import DropIn
from ..report import Report
from ..rules import Configs


def razor_once(model: nn.Module, config: Configs | None) -> Report | None:
    """Call ``razor_``, unless the model is razored already: then what was done to it stands. Returns the report."""
    if any(isinstance(module, DropIn) for module in model.modules()):
        return None
    return razor_(model, config)


class Looks:
    """What the callbacks have in common: their settings, the latest figures, and the step that they look at.

    Raises:
        ValueError: ``every`` is below 1.
    """

    def __init__(self, config: Configs | None = None, every: int | None = None, layers: bool = False) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every={every} is not allowed: use a number of steps of at least 1, or None")
        self.config, self.every, self.layers = config, every, layers
        self.report: Report | None = None
        self.figures: dict[str, float] = {}
        self._looking: StepFigures | None = None

    def _close(self) -> None:
        """Stop looking at a step, if at one; its figures are the latest now."""
        if self._looking is not None:
            looking, self._looking = self._looking, None
            self.figures = looking.close()


class StepFigures:
    """Looks at one training step of ``model``, from ``__init__`` to ``close``.

    The ledger has to be open while the graph is built and read while it lives, so a step has three moments: before the
    forward (``__init__``), after it and before backward (``take``), and after backward (``close``).

    Args:
        model: razored.
        layers: whether the figures name the kept energy of each layer, too.
    """

    def __init__(self, model: nn.Module, layers: bool = False) -> None:
        self._layers, self._taken = layers, False
        self._kept: dict[str, float] = {}
        self._contexts = ExitStack()
        self._ledger: Ledger = self._contexts.enter_context(ledger(model))
        self._energy: Energy = self._contexts.enter_context(kept_energy(model))

    def take(self) -> None:
        """Read the ledger. Only the first call counts: of several micro-batches, the first is the one looked at."""
        if not self._taken:
            self._taken = True
            self._ledger.take()  # now: what checkpointing recomputes in backward is no second forward
            rows = self._energy.rows
            self._kept = {row.module: row.kept_energy for row in rows if not math.isnan(row.kept_energy)}

    def close(self) -> dict[str, float]:
        """Stop looking; returns the figures by name.

        ``saved_MB``: what autograd held when ``take`` was called, 1e6 bytes. ``kept_energy`` and
        ``kept_energy_lowest``: mean and smallest over the layers that prune, absent where none does. With ``layers``
        also ``kept_energy/<layer>``. Empty where ``take`` was never called.
        """
        with warnings.catch_warnings():
            if not self._taken:  # the forward failed, and with it went the graph
                warnings.simplefilter("ignore", UserWarning)
            self._contexts.close()
        if not self._taken:
            return {}
        figures = {"saved_MB": self._ledger.total_bytes / 1e6}
        if self._kept:
            figures["kept_energy"] = sum(self._kept.values()) / len(self._kept)
            figures["kept_energy_lowest"] = min(self._kept.values())
        if self._layers:
            figures |= {f"kept_energy/{name}": value for name, value in self._kept.items()}
        return figures
