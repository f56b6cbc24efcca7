"""The training loop: one plain PyTorch trainer for every method, data set, razor and number of processes."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from razorlab import schema
from razorlab.data import DataBundle
from razorlab.errors import Interrupted, UserError
from razorlab.training.distributed import World
from razorlab.training.evaluation import Scores, evaluate
from razorlab.training.full import LESS, OutOfMemory, fits
from razorlab.training.monitor import LOGGER, Monitor
from razorlab.training.network import Network
from razorlab.training.numerics import bad_tensors
from razorlab.training.optimisation import Schedule, make_optimizer
from razorlab.training.sampling import BatchOrder, eval_loader, fetched, train_loader, worker_count, worker_death
from razorlab.training.state import (
    CannotWrite,
    Checkpoints,
    Damaged,
    random_state,
    read_checkpoint,
    set_random_state,
)
from razorlab.training.step import Outcome, Stepper
from razorlab.training.stopping import StopSignals


@dataclass
class Tally:
    """Sums over the steps of one epoch, over all processes."""

    loss: float = 0.0
    correct: float = 0
    images: int = 0
    seconds: float = 0.0

    def add(self, loss: float, correct: float, images: int, seconds: float) -> None:
        """Count one step: mean loss in nats, right answers, images, duration."""
        self.loss += loss * images
        self.correct += correct
        self.images += images
        self.seconds += seconds

    def row(self) -> dict[str, float]:
        """Mean loss, accuracy in percent, images per second; NaN where every step was skipped."""
        return {
            "train_loss": self.loss / self.images if self.images else math.nan,
            "train_top1": 100 * self.correct / self.images if self.images else math.nan,
            "images_per_second": self.images / self.seconds if self.images else math.nan,
        }


@dataclass(frozen=True)
class Fitted:
    """The outcome: scores of the selected weights on both splits, and what the run took."""

    val: Scores
    test: Scores
    best_epoch: int
    steps: int
    skipped_steps: int
    step_seconds: tuple[float, ...]


class Trainer:
    """Fine-tunes ``network`` on ``data``.

    Args:
        network: as ``assemble`` returns it, on its device.
        config: the validated configuration.
        folder: the run's folder; checkpoints go below it.
        config_hash: what a checkpoint must carry to be resumed from.
        world: this process among those that share each batch.
    """

    def __init__(
        self,
        network: Network,
        data: DataBundle,
        config: schema.Config,
        folder: Path,
        config_hash: str,
        world: World | None = None,
    ) -> None:
        settings = config["trainer"]
        self.network, self.config, self.settings = network, config, settings
        self.world = world or World()
        self.device = next(network.model.parameters()).device
        self.checkpoints = Checkpoints(folder / "checkpoints", config_hash, settings["keep"])
        rank, size = self.world.rank, self.world.size
        self.batch = min(settings["batch_size"], len(data.train))
        if self.batch < size:
            raise UserError.value("trainer.batch_size", self.batch, f"at least one image for each of {size} processes")
        self.order = BatchOrder(len(data.train), self.batch, config["seed"], rank, size, settings["drop_last"])
        workers = worker_count(settings["workers"], self.device, self.world.local_size)
        options = {"num_workers": workers, "pin_memory": self.device.type == "cuda"}
        self.train_loader = train_loader(data.train, self.order, config["seed"], **options)
        self.val_loader, self.test_loader = (
            eval_loader(split, settings["eval_batch_size"], rank, size, **options) for split in (data.val, data.test)
        )
        self.total_steps = settings["steps"] or settings["epochs"] * len(self.order)
        self.epochs = math.ceil(self.total_steps / len(self.order))
        self.optimizer = make_optimizer(
            network.model, network.backbone.head, config["optim"], fused=settings["cuda_graph"]
        )
        self.stepper = Stepper(network, self.optimizer, config, self.batch, self.world)
        self.schedule = Schedule(self.optimizer, config["optim"], self.total_steps)
        self.stop = StopSignals(announce=self.world.main)
        self.epoch = self.step = self.skipped = 0
        self.tally = Tally()
        self.best: dict[str, float] = {"top1": -1.0, "loss": math.inf, "epoch": -1, "step": 0}
        self.step_seconds: list[float] = []

    def resume(self) -> None:
        """Go on from the newest checkpoint that is whole, if there is any.

        Raises:
            UserError: as ``Checkpoints.newest``.
        """
        state = self.world.broadcast(self.checkpoints.newest() if self.world.main else None)
        if state is None:
            return
        self.network.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if scaler := state.get("scaler"):
            self.stepper.scaler.load_state_dict(scaler)
        self.epoch, self.step, self.skipped = state["epoch"], state["step"], state["skipped"]
        self.best, self.tally = state["best"], Tally(**state["tally"])
        self.step_seconds = state["step_seconds"].tolist()
        if len(state["random"]) == self.world.size:
            set_random_state(state["random"][self.world.rank])
        elif self.world.main:
            LOGGER.warning("saved by %d processes, now %d: dropout starts anew", len(state["random"]), self.world.size)

    def fit(self, monitor: Monitor) -> Fitted:
        """Train to the end, then score the best epoch's weights on validation and test: under the official protocol
        the last epoch's.

        Raises:
            FloatingPointError: loss, gradient or a kept activation is not finite; nothing of that step reaches the
                weights.
            Interrupted: a signal asked for it; the state is saved.
            UserError: a file of the data set or a data worker is gone, memory is full, or nothing can be written.
        """
        # None: silent only where there is no terminal
        silent = None if self.settings["progress"] and self.world.main else True
        bar = tqdm(total=self.total_steps, initial=self.step, desc="train", unit="step", disable=silent, leave=False)
        with self.stop, bar, logging_redirect_tqdm([LOGGER]):
            try:
                while self.epoch < self.epochs:
                    self._one_epoch(monitor, bar)
            except (CannotWrite, OutOfMemory):
                raise  # what there is to save cannot be, or is not whole
            except RuntimeError as error:
                if (death := worker_death(error)) is None:
                    raise
                raise death from error  # noticed in the middle of a step: what to save is not whole
            except (Interrupted, UserError) as error:
                # All processes stop at one step by a signal; what fails in one of them leaves the others waiting.
                if self.world.size == 1 or isinstance(error, Interrupted):
                    self._save(monitor)
                raise
            self._load_best()
            val, test = self._score(self.val_loader), self._score(self.test_loader)
        return Fitted(val, test, int(self.best["epoch"]), self.step, self.skipped, tuple(self.step_seconds))

    def _one_epoch(self, monitor: Monitor, bar: tqdm) -> None:
        with contextlib.closing(self._batches()) as batches:
            for images, labels in batches:
                self._one_step(images, labels, monitor, bar)
        self._end_epoch(monitor)

    def _one_step(self, images: Tensor, labels: Tensor, monitor: Monitor, bar: tqdm) -> None:
        start = time.perf_counter()
        rate = self.schedule.set(self.step)
        stop = self.stop.received or 0
        images, labels = (tensor.to(self.device, non_blocking=True) for tensor in (images, labels))
        count = self.order.images(self.step % len(self.order))
        with fits(f"step {self.step + 1}", f"else {LESS}, which starts a run of its own", self._goes_on()):
            outcome = self.stepper.take(images, labels, stop, count)
        self._judge(outcome)
        self.step += 1
        seconds = time.perf_counter() - start
        self.step_seconds.append(seconds)
        if outcome.problem is None:
            self.tally.add(outcome.loss, outcome.correct, count, seconds)
            monitor.scalar("train/step_loss", outcome.loss, self.step)
        monitor.scalar("train/lr", rate, self.step)
        row = self.tally.row()
        bar.update()
        bar.set_postfix_str(
            f"loss {row['train_loss']:.3f}, accuracy {row['train_top1']:.1f}%, {row['images_per_second']:.0f} images/s"
        )
        if outcome.stop:
            raise Interrupted(outcome.stop)
        if self.step % self.settings["save_every"] == 0 and self.step < self._epoch_end():
            self._save(monitor)

    def _batches(self) -> Generator[tuple[Tensor, Tensor]]:
        """This process's shares of the batches that are left of the epoch."""
        done = self.epoch * len(self.order)
        self.order.epoch = self.epoch
        self.order.first, self.order.last = self.step - done, self._epoch_end() - done
        return fetched(self.train_loader)

    def _epoch_end(self) -> int:
        """The step after which the epoch is over."""
        return min((self.epoch + 1) * len(self.order), self.total_steps)

    def _judge(self, outcome: Outcome) -> None:
        """Report a step that was not taken, or stop because of it."""
        if outcome.problem is None:
            return
        if self.settings["nonfinite"] == "skip":
            self.skipped += 1
            LOGGER.warning("step %d is skipped: %s", self.step + 1, outcome.problem)
            return
        raise FloatingPointError(
            f"step {self.step + 1}: {outcome.problem}; {self._last_good()}; "
            f"lower optim.lr={self.config['optim']['lr']}, set optim.grad_clip, or trainer.nonfinite=skip"
        )

    def _goes_on(self) -> str:
        """Where a run that memory cut off in the middle of a step goes on."""
        there = "; with more memory free the same command goes on from there"
        return self._last_good() + (there if self.checkpoints.last else "")

    def _last_good(self) -> str:
        return f"last good checkpoint {self.checkpoints.last}" if self.checkpoints.last else "no checkpoint yet"

    def _end_epoch(self, monitor: Monitor) -> None:
        rate = self.optimizer.param_groups[0]["lr"]
        row = {"epoch": self.epoch + 1, "step": self.step, "lr": rate, **self.tally.row()}
        text = f"epoch {row['epoch']}/{self.epochs}: loss {row['train_loss']:.4f}, train {row['train_top1']:.2f}%"
        scores = None
        if row["epoch"] % self.settings["eval_every"] == 0 or self.step == self.total_steps:
            scores = self._score(self.val_loader)
            row |= {f"val_{name}": value for name, value in scores.figures().items() if name != "images"}
            text += f", validation {scores.selected:.2f}%"
        self.epoch, self.tally = self.epoch + 1, Tally()
        if scores is not None:
            self._keep_if_best(scores)
        monitor.epoch(row)
        LOGGER.info("%s, %.0f images/s", text, row["images_per_second"])
        self._save(monitor)

    def _score(self, loader: DataLoader) -> Scores:
        self.world.same_statistics(self.network.model)
        # Several processes may not leave at different batches: they stop after the next step.
        check = self.stop.check if self.world.size == 1 else None
        advice = "else lower trainer.eval_batch_size, which starts a run of its own"
        alone = self.world.size == 1
        good = "the run is saved; with more memory free the same command goes on" if alone else self._goes_on()
        with fits("evaluation", advice, good, UserError if alone else OutOfMemory):
            return evaluate(self.network, loader, self.device, self.settings["precision"], self.world, check)

    def _keep_if_best(self, scores: Scores) -> None:
        """Keep the weights where the validation score is the highest so far; a tie goes to the lower loss. Under the
        official protocol nothing is selected: the last weights stay."""
        best = self.best.get("mean_iou", self.best["top1"])
        last = self.config["data"]["protocol"] == "official"
        if last or (scores.selected, -scores.loss) > (best, -self.best["loss"]):
            self.best = {**scores.figures(), "epoch": self.epoch, "step": self.step}
            if self.world.main:
                self.checkpoints.save_best(self.step, self.network.model.state_dict())

    def _load_best(self) -> None:
        """Take up the weights of the best epoch: the last one is always evaluated, so there is one."""
        path = self.checkpoints.best(int(self.best["step"]))
        try:
            model = read_checkpoint(path)["model"] if self.world.main else None
        except Damaged as error:
            raise UserError(f"{path} is damaged ({error}): trainer.resume=never starts the run over") from error
        self.network.model.load_state_dict(self.world.broadcast(model))

    def _save(self, monitor: Monitor) -> None:
        """Save all that the run needs to go on from here; every process takes part.

        Raises:
            CannotWrite: as ``Checkpoints.save``.
            FloatingPointError: a weight is not finite, which no step may have done: the checkpoints stay good.
        """
        random = self.world.gather(random_state())
        if not self.world.main:
            return
        bad = bad_tensors(self.network.model.named_parameters())
        if bad:
            raise FloatingPointError(
                f"step {self.step}: {bad[0]} is not finite after the optimizer's step; {self._last_good()}; "
                f"lower optim.lr={self.config['optim']['lr']} or set optim.grad_clip"
            )
        monitor.flush()  # what a checkpoint counts as done is on the disk before it
        self.checkpoints.save(
            {
                "model": self.network.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.stepper.scaler.state_dict(),
                "epoch": self.epoch,
                "step": self.step,
                "skipped": self.skipped,
                "tally": asdict(self.tally),
                "best": self.best,
                "step_seconds": torch.tensor(self.step_seconds, dtype=torch.float64),
                "random": random,
            }
        )
