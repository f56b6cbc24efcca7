"""A callback for the ``Trainer`` of transformers.

trainer = Trainer(model, arguments, train_dataset=data, callbacks=[RazorCallback(RazorConfig(sparsity=0.9))])
trainer.train()
"""

from __future__ import annotations

from typing import Any

from torch.utils.hooks import RemovableHandle

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "backrazor.integrations.transformers needs transformers: pip install backrazor[transformers]"
    ) from error

from ..convert import check_finite
from ..hooks import passive
from ..rules import Configs
from .figures import Looks, StepFigures, razor_once


class RazorCallback(Looks, TrainerCallback):
    """Razors the model of a ``Trainer``, checks for bad numbers, and logs saved bytes and kept energy.

    The model is razored when the ``Trainer`` is made: before it is wrapped for several devices, after adapters were put
    on. A model that was razored by hand is left as it is. It stays razored after training; ``backrazor.unrazor_`` is
    the way back, and ``save_pretrained`` needs none.

    Before each step of the optimizer, ``backrazor.check_finite`` stops the training if an activation held NaN or Inf.
    The weights are then as the step before left them.

    At the steps that are logged, the entry of ``trainer.state.log_history`` also has ``saved_MB`` (what autograd held
    at the end of the model's forward, of the first micro-batch; a loss that is computed outside of the model is not in
    it), ``kept_energy`` (mean over layers) and ``kept_energy_lowest``. Callbacks that were added later, such as the one
    that prints, see them as well. For those that report to TensorBoard and others, call ``report_first``.

    Args:
        config: as for ``razor_``: one ``RazorConfig``, or a dict from name patterns to them. None: compact at 0.9.
        every: how many steps lie between two looks. None: as often as the ``Trainer`` logs, or every 50 steps where it
            does not log by steps.
        layers: log the kept energy of each layer, too.

    Attributes:
        report: what ``razor_`` did, None where the model was razored already.
        figures: the latest figures, by name.

    Raises:
        FloatingPointError: during training, see ``backrazor.check_finite``.
    """

    def __init__(self, config: Configs | None = None, every: int | None = None, layers: bool = False) -> None:
        super().__init__(config, every, layers)
        self._hook: RemovableHandle | None = None

    def report_first(self, trainer: Trainer) -> RazorCallback:
        """Move this callback before those that report to TensorBoard and the like, so that they see its figures.

        Returns:
            The callback itself.

        Raises:
            ValueError: the callback is not one of the ``Trainer``.
        """
        callbacks = trainer.callback_handler.callbacks
        if self not in callbacks:
            raise ValueError("this callback is not one of the Trainer: pass it as callbacks=[...] or to add_callback")
        callbacks.remove(self)
        callbacks.insert(0, self)
        return self

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Razor the model before anything wraps it."""
        self.report = razor_once(kwargs["model"], self.config)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Razor a model that was made since, by ``model_init``, or a Trainer that was given this callback late."""
        self._stop_looking()  # what a training before left open when it was interrupted: no event tells of that
        self.report = razor_once(kwargs["model"], self.config) or self.report
        hook = passive(lambda _model, _arguments, output: self._after_forward(output))
        self._hook = kwargs["model"].register_forward_hook(hook, always_call=True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the ledger at the steps that are going to be logged."""
        step, every = state.global_step + 1, self.every
        if every is None:
            every = max(1, int(state.logging_steps)) if args.logging_strategy == "steps" else 50
        if step % every == 0 or (step == 1 and args.logging_first_step):
            self._looking = StepFigures(kwargs["model"], self.layers)

    def _after_forward(self, output: object) -> None:
        """Read the ledger, or close it where the forward raised: then there is no output, and no event follows."""
        if output is None:
            self._close()
        elif self._looking is not None:
            self._looking.take()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the ledger, and stop on bad numbers before the weights change."""
        self._close()
        check_finite(kwargs["model"])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the latest figures to what is logged of a training step."""
        if logs is not None and "loss" in logs:
            logs.update(self.figures)
            state.log_history[-1].update(self.figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the hook off."""
        self._stop_looking()

    def _stop_looking(self) -> None:
        self._close()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
