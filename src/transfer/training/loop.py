"""The training loop: one plain PyTorch trainer for every method, data set and razor."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import backrazor as br
from transfer.data import DataBundle
from transfer.training.evaluation import Scores, correct_in_top, evaluate
from transfer.training.monitor import LOGGER, Monitor
from transfer.training.network import Network
from transfer.training.optimisation import Schedule, make_optimizer
from transfer.training.state import load_state, random_state, save_state, set_random_state


class EpochOrder(Sampler[int]):
    """A random order that depends on the seed and the epoch alone, so that a resumed run sees the same one."""

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())


@dataclass
class Tally:
    """Sums over the steps of one epoch."""

    loss: float = 0.0
    correct: int = 0
    images: int = 0
    seconds: float = 0.0

    def add(self, loss: float, correct: int, images: int, seconds: float) -> None:
        """Count one step: mean loss in nats, right answers, images, duration."""
        self.loss += loss * images
        self.correct += correct
        self.images += images
        self.seconds += seconds

    def row(self) -> dict[str, float]:
        """Mean loss, accuracy in percent, images a second."""
        return {
            "train_loss": self.loss / self.images,
            "train_top1": 100 * self.correct / self.images,
            "images_per_second": self.images / self.seconds,
        }


@dataclass(frozen=True)
class Fitted:
    """The outcome: scores of the selected weights on both splits, and what the run took."""

    val: Scores
    test: Scores
    best_epoch: int
    steps: int
    step_seconds: tuple[float, ...]


class Trainer:
    """Fine-tunes ``network`` on ``data``.

    Args:
        network: as ``assemble`` returns it, on its device.
        config: the validated configuration.
        folder: the run's folder; checkpoints go below it.
        config_hash: what a checkpoint must carry to be resumed from.
    """

    def __init__(
        self, network: Network, data: DataBundle, config: Mapping[str, Any], folder: Path, config_hash: str
    ) -> None:
        settings = config["trainer"]
        self.network, self.config, self.settings = network, config, settings
        self.device = next(network.model.parameters()).device
        self.checkpoints = folder / "checkpoints"
        self.config_hash = config_hash
        self.order = EpochOrder(len(data.train), config["seed"])
        batch = min(settings["batch_size"], len(data.train))
        common = {"num_workers": settings["workers"], "pin_memory": self.device.type == "cuda"}
        self.train_loader = DataLoader(data.train, batch, sampler=self.order, drop_last=True, **common)
        self.val_loader = DataLoader(data.val, settings["eval_batch_size"], **common)
        self.test_loader = DataLoader(data.test, settings["eval_batch_size"], **common)
        self.total_steps = settings["steps"] or settings["epochs"] * len(self.train_loader)
        self.epochs = math.ceil(self.total_steps / len(self.train_loader))
        self.optimizer = make_optimizer(network.model, network.backbone.head, config["optim"])
        self.schedule = Schedule(self.optimizer, config["optim"], self.total_steps)
        self.epoch = self.step = 0
        self.best: dict[str, float] = {"top1": -1.0, "loss": math.inf, "epoch": -1}
        self.step_seconds: list[float] = []

    def resume(self) -> None:
        """Go on from the last epoch that was saved, if any."""
        state = load_state(self.checkpoints / "last.pt", self.config_hash)
        if state is None:
            return
        self.network.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        self.step_seconds = state["step_seconds"]
        set_random_state(state["random"])

    def fit(self, monitor: Monitor) -> Fitted:
        """Train to the end, then score the best epoch's weights on validation and test.

        Raises:
            FloatingPointError: loss or a kept activation is not finite; nothing of that step reaches the weights.
        """
        silent = None if self.settings["progress"] else True  # None: silent only where there is no terminal
        bar = tqdm(total=self.total_steps, initial=self.step, desc="train", unit="step", disable=silent, leave=False)
        with bar, logging_redirect_tqdm([LOGGER]):
            while self.step < self.total_steps:
                self._one_epoch(monitor, bar)
        best = load_state(self.checkpoints / "best.pt", self.config_hash)
        assert best is not None, "the last epoch is always evaluated, so a best one exists"
        self.network.model.load_state_dict(best["model"])
        val, test = self._score(self.val_loader), self._score(self.test_loader)
        return Fitted(val, test, int(self.best["epoch"]), self.step, tuple(self.step_seconds))

    def _one_epoch(self, monitor: Monitor, bar: tqdm) -> None:
        self.order.epoch = self.epoch
        tally = Tally()
        rate = 0.0
        for images, labels in self.train_loader:
            start = time.perf_counter()
            rate = self.schedule.set(self.step)
            loss, correct = self._train_step(images.to(self.device), labels.to(self.device))
            self.step += 1
            seconds = time.perf_counter() - start
            self.step_seconds.append(seconds)
            tally.add(loss, correct, len(labels), seconds)
            monitor.scalar("train/step_loss", loss, self.step)
            monitor.scalar("train/lr", rate, self.step)
            row = tally.row()
            bar.update()
            bar.set_postfix_str(
                f"loss {row['train_loss']:.3f}, accuracy {row['train_top1']:.1f}%, "
                f"{row['images_per_second']:.0f} images/s"
            )
            if self.step == self.total_steps:
                break
        self.epoch += 1
        row = {"epoch": self.epoch, "step": self.step, "lr": rate, **tally.row()}
        text = f"epoch {self.epoch}/{self.epochs}: loss {row['train_loss']:.4f}, train {row['train_top1']:.2f}%"
        if self.epoch % self.settings["eval_every"] == 0 or self.step == self.total_steps:
            scores = self._score(self.val_loader)
            row |= {f"val_{name}": getattr(scores, name) for name in ("loss", "top1", "top5")}
            text += f", validation {scores.top1:.2f}%"
            self._keep_if_best(scores)
        monitor.epoch(row)
        LOGGER.info("%s, %.0f images/s", text, row["images_per_second"])
        self._save()

    def _train_step(self, images: Tensor, labels: Tensor) -> tuple[float, int]:
        """One optimizer step over one batch, in micro-batches; returns mean loss and right answers."""
        self.optimizer.zero_grad(set_to_none=True)
        micro = self.settings["micro_batch"] or len(labels)
        total, correct = 0.0, 0
        for x, y in zip(images.split(micro), labels.split(micro), strict=True):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings["precision"] == "bfloat16"):
                logits = self.network.model(self.network.normalise(x))
            smoothing = self.config["optim"]["label_smoothing"]
            loss = F.cross_entropy(logits.float(), y, label_smoothing=smoothing) * (len(y) / len(labels))
            loss.backward()
            total += float(loss.detach())
            correct += correct_in_top(logits.detach(), y, 1)
        if not math.isfinite(total):
            raise FloatingPointError(
                f"step {self.step}: the loss is {total}; lower optim.lr={self.config['optim']['lr']}"
                " or set optim.grad_clip"
            )
        if self.network.razored:
            br.check_finite(self.network.model)
        if self.config["optim"]["grad_clip"] is not None:
            trained = [p for p in self.network.model.parameters() if p.requires_grad]
            torch.nn.utils.clip_grad_norm_(trained, self.config["optim"]["grad_clip"])
        self.optimizer.step()
        return total, correct

    def _score(self, loader: DataLoader) -> Scores:
        return evaluate(self.network, loader, self.device, self.settings["precision"])

    def _keep_if_best(self, scores: Scores) -> None:
        """Keep the weights where validation accuracy is the highest so far; a tie goes to the lower loss."""
        if (scores.top1, -scores.loss) > (self.best["top1"], -self.best["loss"]):
            self.best = {**asdict(scores), "epoch": self.epoch}
            save_state(self.checkpoints / "best.pt", {"model": self.network.model.state_dict()}, self.config_hash)

    def _save(self) -> None:
        state = {
            "model": self.network.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "step_seconds": self.step_seconds,
            "random": random_state(),
        }
        save_state(self.checkpoints / "last.pt", state, self.config_hash)
