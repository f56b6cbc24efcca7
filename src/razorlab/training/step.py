"""One optimizer step: in micro-batches, shared by processes, with a look for bad numbers before the weights change."""

from __future__ import annotations

import contextlib
import signal
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from razorlab import schema
from razorlab.training.distributed import World
from razorlab.training.evaluation import correct_in_top, training_loss
from razorlab.training.first_forward import explained
from razorlab.training.graphs import GraphedStep
from razorlab.training.network import Network, autocast
from razorlab.training.numerics import (
    HeldStatistics,
    activation_is_bad,
    bad_activation,
    bad_step,
    gradient_is_bad,
)
from razorlab.training.optimisation import clip_each
from razorlab.training.releasing import ReleasedGradients

MOST_OVERFLOWS = 20  # in a row: the scale has gone from 65,536 below one by then
STOPS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Outcome:
    """One step, over all processes.

    Args:
        loss: mean over the batch, nats.
        correct: right answers; of maps the sum over images of the share of pixels that are right.
        problem: why the weights are as they were before; None where the step was taken.
        stop: the signal that some process was stopped by, 0 for none. Every process has the same.
    """

    loss: float
    correct: float
    problem: str | None
    stop: int


class Stepper:
    """Takes optimizer steps.

    Args:
        network: what trains.
        optimizer: over its parameters.
        config: the validated configuration.
        batch: images per step, over all processes; ``take`` may be given another number.
        world: this process among them.
    """

    def __init__(
        self,
        network: Network,
        optimizer: torch.optim.Optimizer,
        config: schema.Config,
        batch: int,
        world: World,
    ) -> None:
        self.network, self.optimizer, self.batch, self.world = network, optimizer, batch, world
        self.settings, self.optim = config["trainer"], config["optim"]
        self.device = next(network.model.parameters()).device
        self.shared: Any = world.share(network.model, self.device)
        self.forward: Any = torch.compile(self.shared) if self.settings["compile"] else self.shared
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.settings["precision"] == "float16")
        self.overflows = 0  # steps in a row that were left out since scaled gradients overflowed
        self.first = True
        self.name, self.size = config["model"]["name"], config["data"]["image_size"]
        self.released = None
        if self.settings["release_gradients"]:
            self.released = ReleasedGradients(network, optimizer, self.optim["grad_clip_each"])
        self.halves = GraphedStep(self, optimizer) if self.settings["cuda_graph"] else self

    def take(self, images: Tensor, labels: Tensor, stop: int = 0, batch: int | None = None) -> Outcome:
        """Take one step: two pieces of work for the device, and one read of it between them.

        Args:
            images, labels: this process's share of the batch, on its device: uint8 (n, 3, S, S) and classes (n,).
            stop: the signal that this process was stopped by, 0 for none.
            batch: images over all processes, where that is another number than in the step before.

        Raises:
            UserError: the step was to be captured as a CUDA graph and cannot be.
        """
        self.batch = batch or self.batch
        held = HeldStatistics(self.network.model) if self.settings["nonfinite"] == "skip" else None
        figures = self.halves.gradients(images, labels)
        votes = torch.zeros(len(STOPS), dtype=torch.float64, device=self.device)
        if stop:
            votes[STOPS.index(stop)] = 1
        # the step's one wait
        mean, right, problems, overflows, *stopped = self.world.sum(torch.cat([figures, votes]))
        left_out = bool(overflows) and self.scaler.is_enabled()
        self.overflows = self.overflows + 1 if left_out else 0
        problem = None
        if problems or self.overflows > MOST_OVERFLOWS:
            problem = self._explain(float(figures[0]), images)
        if problem is not None and held is not None:
            held.restore()
        if problem is None and not left_out:
            self.halves.update()
        voted = [number for number, votes in zip(STOPS, stopped, strict=True) if votes]
        return Outcome(mean, right, problem, max(voted, default=0))

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """Forward and backward. Reads nothing: returns (4,) float64 on the device, this process's part of the batch's
        mean loss, its right answers, whether a number is bad, and whether a gradient is not finite.

        Where gradients are released, backward takes the optimizer's step, after one read that finds the loss good."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.released is not None:
            self.released.begin()
        loss, correct = self._accumulate(self._parts(images), labels)
        self.scaler.unscale_(self.optimizer)
        self.scaler.update()  # by what unscale_ has seen
        overflow = gradient_is_bad(self.network.model) if self.released is None else self.released.gradient_is_bad()
        bad = ~loss.isfinite()
        packed = activation_is_bad(self.network)
        if packed is not None:
            bad = bad | packed
        if not self.scaler.is_enabled():  # a scaled gradient may overflow: that step is left out
            bad = bad | overflow
        return torch.stack([loss, correct, bad.double(), overflow.double()])

    def update(self) -> None:
        """Clip the gradients and take the optimizer's step. Reads nothing."""
        if self.released is not None:
            return
        trained = [p for p in self.network.model.parameters() if p.requires_grad]
        if self.optim["grad_clip_each"] is not None:
            clip_each(trained, self.optim["grad_clip_each"])
        if self.optim["grad_clip"] is not None:
            torch.nn.utils.clip_grad_norm_(trained, self.optim["grad_clip"])
        self.optimizer.step()

    def _parts(self, images: Tensor) -> tuple[Tensor, ...]:
        return images.split(self.settings["micro_batch"] or len(images))

    def _explain(self, loss: float, images: Tensor) -> str | None:
        """Say what is bad, in this process or in another; None where a gradient's norm alone is beyond float32."""
        fault = bad_activation(self.network)
        if self.overflows > MOST_OVERFLOWS:
            return f"gradients overflowed float16 in {self.overflows} steps in a row; try trainer.precision=bfloat16"
        parts = self._parts(images)
        gone = None if self.released is None else self.released.bad_gradients()
        problem = bad_step(
            self.network, loss, fault, lambda: (self._logits(self.network.model, x) for x in parts), gone
        )
        return next((text for text in self.world.gather(problem) if text), None)

    def _accumulate(self, parts: tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Add up the gradients of the share; returns its part of the batch's mean loss, and its right answers, both ()
        float64 on the device."""
        total, correct = torch.zeros(2, dtype=torch.float64, device=self.device)
        for number, (x, y) in enumerate(zip(parts, labels.split(len(parts[0])), strict=True)):
            with self._gradients_stay_here(number < len(parts) - 1):
                with self._first_explained():
                    logits = self._logits(self.forward, x)
                loss = training_loss(logits, y, self.optim["label_smoothing"])
                loss = loss * (len(y) / self.batch)
                if self.released is None or self.released.may_go_back(loss):
                    self.scaler.scale(loss * self.world.size).backward()  # the processes' gradients are averaged
            total = total + loss.detach()
            correct = correct + correct_in_top(logits.detach(), y, 1)
        return total, correct

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        with autocast(self.device, self.settings["precision"]):
            return model(self.network.normalise(images)).float()

    def _plain_logits(self, images: Tensor) -> Tensor:
        return self._logits(self.network.model, images)

    def _first_explained(self) -> contextlib.AbstractContextManager[None]:
        """Training mode may refuse what evaluation takes: batch norm wants more than one value per channel."""
        first, self.first = self.first, False
        return explained(self.network.backbone, self.name, self.size) if first else contextlib.nullcontext()

    def _gradients_stay_here(self, more: bool) -> contextlib.AbstractContextManager[None]:
        return self.shared.no_sync() if more and self.world.size > 1 else contextlib.nullcontext()
