"""A callback for the ``Trainer`` of Lightning.

trainer = Trainer(max_epochs=5, callbacks=[RazorCallback(RazorConfig(sparsity=0.9))])
trainer.fit(module, data)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("backrazor.integrations.lightning needs lightning: pip install backrazor[lightning]") from error

from ..convert import check_finite
from ..rules import Configs
from .figures import Looks, StepFigures, razor_once


class RazorCallback(Looks, Callback):
    """Razors a ``LightningModule``, checks for bad numbers, and logs saved bytes and kept energy.

    The module is razored in ``setup`` for ``fit``: before the strategy wraps it and before ``configure_optimizers``. A
    module that was razored by hand is left as it is. It stays razored after training; ``backrazor.unrazor_`` is the way
    back, and checkpoints need none.

    Before each step of an optimizer, ``backrazor.check_finite`` stops the training if an activation held NaN or Inf.
    The weights are then as the step before left them.

    At the steps that are logged, ``saved_MB`` (what autograd held when the loss was made, of the first micro-batch),
    ``kept_energy`` (mean over layers) and ``kept_energy_lowest`` go to the loggers, under ``razor/``.

    Args:
        config: as for ``razor_``: one ``RazorConfig``, or a dict from name patterns to them. None: compact at 0.9.
        every: how many optimizer steps lie between two looks. None: as often as the ``Trainer`` logs.
        layers: log the kept energy of each layer, too.

    Attributes:
        report: what ``razor_`` did, None where the module was razored already.
        figures: the latest figures, by name.

    Raises:
        FloatingPointError: during training, see ``backrazor.check_finite``.
    """

    def __init__(self, config: Configs | None = None, every: int | None = None, layers: bool = False) -> None:
        super().__init__(config, every, layers)
        self._seen = 0  # the optimizer step that was looked at last

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Razor the module before anything wraps it."""
        if stage == "fit":
            self.report, self._seen = razor_once(pl_module, self.config), 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Open the ledger at the first micro-batch of a step that is going to be logged."""
        every = self.every or max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]  # set by its logger connector
        step = trainer.global_step + 1
        if step // every > self._seen // every:  # with several optimizers the count may jump over a multiple
            self._seen, self._looking = step, StepFigures(pl_module, self.layers)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Read the ledger while the graph lives."""
        if self._looking is not None:
            self._looking.take()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Stop on bad numbers before the weights change."""
        check_finite(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Close the ledger, and hand the latest figures to the loggers, which take them when they log."""
        self._close()
        if self.figures:
            figures = {f"razor/{name}": value for name, value in self.figures.items()}
            pl_module.log_dict(figures, on_step=True, on_epoch=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the ledger of a step that did not end."""
        self._close()
