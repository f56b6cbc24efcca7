"""What a configuration will need before anybody trains it: which layer keeps what, what batch or sparsity fits.

Every figure is predicted from shapes (``br.memory.predict``); no activation is allocated. A step's *need* is its
predicted peak and what is resident beside it: weights, gradients, optimizer state and the input batch. What a device
takes for itself (a CUDA context: some hundred MB) is not in it. Bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

import backrazor as br
from razorlab import schema
from razorlab.errors import UserError
from razorlab.records import task_of
from razorlab.training.costs import label_shape
from razorlab.training.evaluation import training_loss
from razorlab.training.first_forward import explained
from razorlab.training.network import AUTOCAST, Network, assemble, razor_config, razor_network
from razorlab.training.optimisation import make_optimizer

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
EXACT_BATCH = 32  # images; a razored step's prediction visits every chunk of samples, so larger ones are extrapolated
MOST_IMAGES = 1 << 20
SPARSITIES = tuple(step / 100 for step in range(100))


def parse_size(key: str, text: str) -> int:
    """Return the bytes of a size such as ``24GiB`` or ``600MB``.

    Raises:
        UserError: it is none, or not above zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|B)", text.strip())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise UserError.value(key, text, "a size above zero in " + "|".join(UNITS) + ", such as 24GiB")
    return size


class StepProfile:
    """Predictions for the training step of a configuration, plain and razored.

    Args:
        config: the validated configuration; ``razor`` says how the razored one is razored.
        classes: size of the head.
        image_size: side of the input, pixels.

    Raises:
        UserError: as ``assemble``; texts instead of images; or activations are to be recomputed, which the prediction
            leaves out.
    """

    def __init__(self, config: schema.Config, classes: int, image_size: int) -> None:
        if task_of(config) == "text":
            raise UserError("task=text is not profiled from images: train.py logs what a step of texts holds")
        checkpointing = config["trainer"]["checkpointing"]
        if checkpointing != "none":
            raise UserError(
                f"trainer.checkpointing={checkpointing} is not predicted: its peak is measured by "
                "`python train.py ... trainer.measure.mode=all`; choose none"
            )
        self.config, self.image_size = config, image_size
        self.razor = razor_config(config["razor"])
        plain: schema.Config = {**config, "razor": {**config["razor"], "name": "none"}}
        self.network: Network = assemble(plain, classes)
        self.optimizer = make_optimizer(self.network.model, self.network.backbone.head, config["optim"])
        self._known: dict[tuple[float | None, int], br.memory.Prediction] = {}

    def predict(self, batch: int, sparsity: float | None) -> br.memory.Prediction:
        """Predict a step of ``batch`` images: of the plain network where ``sparsity`` is None, else razored at it.

        Raises:
            UserError: the network cannot take such images.
        """
        if (sparsity, batch) not in self._known:
            model: Any = self.network.model
            br.unrazor_(model)
            model.coarse = False
            if sparsity is not None and self.razor is not None:
                razor = dataclasses.replace(self.razor, sparsity=sparsity)
                razor_network(model, razor, self.config["razor"]["dense"])
            try:
                with (
                    _fake_tensors_silent(),
                    explained(self.network.backbone, self.config["model"]["name"], self.image_size),
                ):
                    self._known[sparsity, batch] = br.memory.predict(
                        model,
                        (3, self.image_size, self.image_size),
                        batch,
                        loss_fn=functools.partial(self._loss, batch),
                        autocast=AUTOCAST[self.config["trainer"]["precision"]],
                        optimizer=self.optimizer,
                        release_gradients=self.config["trainer"]["release_gradients"],
                    )
            finally:
                br.unrazor_(model)
        return self._known[sparsity, batch]

    def resident(self, batch: int) -> dict[str, int]:
        """Return what lies beside the activations: weights, gradients, optimizer state, the input of ``batch``."""
        any_batch = next(iter(self._known.values()), None) or self.predict(1, None)
        return {
            "weights": any_batch.weight_bytes,
            "gradients": any_batch.gradient_bytes,
            "optimizer state": any_batch.optimizer_bytes,
            "input": batch * 3 * self.image_size**2 * 4,
        }

    def need(self, batch: int, sparsity: float | None) -> int:
        """Bytes that the whole step needs.

        A razored step of more than ``EXACT_BATCH`` images is on the line through ``EXACT_BATCH`` and half of it: the
        chunks that backward works in are full by then, and every image adds the same. It takes less where blocks begin
        to run some samples at a time beyond that batch.
        """
        if sparsity is None or batch <= EXACT_BATCH:
            peak = self.predict(batch, sparsity).peak_bytes
        else:
            low, high = (self.predict(images, sparsity).peak_bytes for images in (EXACT_BATCH // 2, EXACT_BATCH))
            peak = high + (batch - EXACT_BATCH) * (high - low) * 2 // EXACT_BATCH
        return peak + sum(self.resident(batch).values())

    def largest_batch(self, budget: int, sparsity: float | None) -> int:
        """Return the largest batch whose step fits ``budget`` bytes; 0 where a single image does not."""
        first, second = self.need(1, sparsity), self.need(2, sparsity)
        if first > budget:
            return 0
        guess = min(1 + (budget - first) // max(second - first, 1), MOST_IMAGES)
        step, low, high = 1, guess, guess
        while low > 1 and self.need(low, sparsity) > budget:
            low, high, step = max(1, low - step), low, 2 * step
        while high <= low < MOST_IMAGES:
            high = low + step
            if self.need(high, sparsity) <= budget:
                low, step = high, 2 * step
        return _last_true(lambda batch: self.need(batch, sparsity) <= budget, low, high)

    def least_sparsity(self, budget: int, batch: int) -> float:
        """Return the smallest sparsity, in hundredths, at which a step of ``batch`` images fits ``budget`` bytes.

        Raises:
            UserError: none does, or the preset prunes nothing.
        """
        if self.config["razor"]["name"] not in ("compact", "paper"):
            raise UserError.value(
                "razor", self.config["razor"]["name"], "compact|paper, which prune, to choose by budget"
            )
        least = self.need(batch, SPARSITIES[-1])
        if least > budget:
            raise UserError(
                f"budget={budget / 1e6:.1f}MB is too small: batch={batch} needs {least / 1e6:.1f}MB at sparsity "
                f"{SPARSITIES[-1]}; give a larger budget or a smaller batch"
            )
        # From the sparsest down: the last that still fits.
        steps = _last_true(lambda back: self.need(batch, SPARSITIES[-1 - back]) <= budget, 0, len(SPARSITIES))
        return SPARSITIES[-1 - steps]

    def _loss(self, batch: int, logits: Tensor) -> Tensor:
        labels = logits.new_zeros(label_shape(self.config, batch, self.image_size), dtype=torch.long)
        return training_loss(logits, labels, self.config["optim"]["label_smoothing"])


@contextmanager
def _fake_tensors_silent() -> Iterator[None]:
    """Without torch's own log of an error on fake tensors, which is raised as well."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _last_true(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Return the largest n in [low, high) with ``holds(n)``: it holds at ``low``, and where it fails it fails on."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def layer_table(profile: StepProfile, batch: int, sparsity: float | None, rows: int | None) -> str:
    """Return which layer keeps what for backward, plain and razored, largest first, the sum at the bottom.

    Args:
        rows: how many layers are shown; the others share one line. None shows all.
    """
    dense = profile.predict(batch, None).rows
    razored = profile.predict(batch, sparsity).rows if sparsity is not None else ()
    kept = dense if sparsity is None else razored
    names = dict.fromkeys(row.module for row in (*dense, *razored))
    lines = []
    for name in names:
        before, after = (sum(row.bytes for row in side if row.module == name) for side in (dense, razored))
        what = dict.fromkeys(_role(row) for row in kept if row.module == name)
        lines.append((name or "(loss)", before, after, ", ".join(what) or "nothing"))
    lines.sort(key=lambda line: (-line[1], -line[2]))
    shown, rest = (lines, []) if rows is None else (lines[:rows], lines[rows:])
    if rest:
        shown = [*shown, (f"{len(rest)} smaller layers", sum(r[1] for r in rest), sum(r[2] for r in rest), "")]
    shown = [*shown, ("saved in all", sum(line[1] for line in lines), sum(line[2] for line in lines), "")]
    if sparsity is None:
        plain = [(name, f"{before / 1e6:.3f}", what) for name, before, _, what in shown]
        return tabulate(
            plain, ("layer", "dense, MB", "keeps"), disable_numparse=True, colalign=("left", "right", "left")
        )
    table = [(name, f"{a / 1e6:.3f}", f"{b / 1e6:.3f}", _ratio(a, b), what) for name, a, b, what in shown]
    headings = ("layer", "dense, MB", "razored, MB", "less", "keeps when razored")
    return tabulate(table, headings, disable_numparse=True, colalign=("left", "right", "right", "right", "left"))


def _role(row: br.memory.LedgerRow) -> str:
    return f"{row.role} ({row.reason})" if row.role == "dense" and row.reason else row.role


def _ratio(before: int, after: int) -> str:
    return f"{before / after:.1f}x" if after else ("all" if before else "")


def need_table(profile: StepProfile, batch: int, sparsity: float | None) -> str:
    """Return all that a step needs, MB: its four parts, the input batch and their sum, a line for each network."""
    resident = profile.resident(batch)
    lines = []
    for label, at in {"dense": None, **({} if sparsity is None else {"razored": sparsity})}.items():
        total = profile.need(batch, at)
        weights, gradients, state, images = resident.values()
        sizes = weights, gradients, state, total - sum(resident.values()), images, total
        lines.append((label, *(f"{size / 1e6:.1f}" for size in sizes)))
    headings = ("MB", "weights", "gradients", "optimizer state", "predicted peak", "input", "in all")
    return tabulate(lines, headings, disable_numparse=True, colalign=("left", *["right"] * 6))
