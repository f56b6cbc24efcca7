"""What it takes to run a table: cells that are missing, files that are missing, an estimate of the time."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from backrazor.memory.peak import WARM_UP_STEPS
from razorlab import schema
from razorlab.data.published import PUBLISHED
from razorlab.data.published.listing import missing_files
from razorlab.data.scenes import SCENES
from razorlab.errors import UserError
from razorlab.models.text import find_folder
from razorlab.models.weights import find_weights
from razorlab.models.zoo import find_spec
from razorlab.recipes import Recipe
from razorlab.records import run_directory, task_of
from razorlab.training.costs import build_step, pick_device, step_shape

DIGITS_IMAGES, DIGITS_CLASSES = 1797, 10
PROBE_IMAGES = 8  # of the steps that an estimate is taken from
PROBE_STEPS = 2
LONG_STEP = 5.0  # seconds; one such is enough


@dataclass(frozen=True)
class Cell:
    """One run of a table: a recipe with a seed, composed."""

    recipe: Recipe
    config: schema.Config

    @property
    def finished(self) -> bool:
        """Whether its record is there."""
        return (run_directory(self.config, self.recipe.name) / "record.json").is_file()


def missing_inputs(cells: Sequence[Cell]) -> list[str]:
    """Return one line for each data set and weights file that ``cells`` need and lack, with the command for it."""
    lines: dict[str, None] = {}
    for cell in cells:
        for line in (_missing_data(cell.config), _missing_weights(cell.config)):
            if line is not None:
                lines[line] = None
    return list(lines)


def _missing_data(config: schema.Config) -> str | None:
    name = config["data"]["name"]
    if name not in PUBLISHED:
        return None
    root = Path(config["data"]["root"] or Path(config["paths"]["data"]) / name).expanduser()
    problems = missing_files(PUBLISHED[name], root)
    if not problems:
        return None
    place = "" if config["paths"]["data"] == "data" else f" --root {config['paths']['data']}"
    return f"data {name}: {problems[0]}: {PUBLISHED[name].command}{place}"


def _missing_weights(config: schema.Config) -> str | None:
    model = config["model"]
    if not model["pretrained"]:
        return None
    if task_of(config) == "text":
        try:
            find_folder(model)
        except UserError as error:
            return f"weights {error}"
        return None
    spec = find_spec(model["name"])
    assert spec is not None, model["name"]
    try:
        find_weights(model["name"], spec, model["weights"], Path(config["paths"]["pretrain"]))
    except UserError as error:
        return f"weights {error}"
    return None


def needs(cells: Sequence[Cell]) -> str:
    """Return what ``cells`` need, in one line."""
    data = dict.fromkeys(cell.config["data"]["name"] for cell in cells)
    models = dict.fromkeys(
        f"{cell.config['model']['name']} ({'pretrained' if cell.config['model']['pretrained'] else 'random'} weights)"
        for cell in cells
    )
    return f"data {', '.join(data)}; model {', '.join(models)}"


def estimated_seconds(cells: Sequence[Cell]) -> float:
    """Return an estimate of the time that ``cells`` take one after the other on this machine.

    Each row's step is timed once, on random images and random weights, at a few images, and scaled by the number of
    images that training and evaluation see; the fresh processes that measure a cell's peak and time count with their
    start, timed once. Data loading is not in it.
    """
    measures = any(cell.config["trainer"]["measure"]["mode"] == "all" for cell in cells)
    start = _start_seconds() if measures else 0.0
    probes: dict[str, tuple[float, float]] = {}
    total = 0.0
    for cell in cells:
        row = cell.recipe.row.name
        if row not in probes:
            probes[row] = _probe(cell.config, _classes(cell.config))
        step, forward = probes[row]
        trained, evaluated = _images(cell.config)
        total += trained * step + evaluated * forward + _measuring_seconds(cell.config, step, start)
    return total


def _start_seconds() -> float:
    """Seconds that a fresh process takes before its first step."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import razorlab.training.costs"], check=True)
    return time.perf_counter() - began


def _measuring_seconds(config: schema.Config, step: float, start: float) -> float:
    """Seconds of measuring peak and time, for ``step`` seconds per image and ``start`` seconds per process."""
    measure = config["trainer"]["measure"]
    if measure["mode"] != "all":
        return 0.0
    images, _ = step_shape(config)
    steps = (WARM_UP_STEPS + 1) + (WARM_UP_STEPS + measure["steps"])  # of a process for the peak, of one for the time
    return measure["repeats"] * (2 * start + steps * images * step)


def _classes(config: schema.Config) -> int:
    name = config["data"]["name"]
    if task_of(config) == "segmentation":
        return {"scenes": DIGITS_CLASSES + 1, "pets": 2}.get(name) or PUBLISHED[name].classes
    return PUBLISHED[name].classes if name in PUBLISHED else DIGITS_CLASSES


def _images(config: schema.Config) -> tuple[int, int]:
    """Images that a run trains on and evaluates, repeats counted."""
    data, trainer = config["data"], config["trainer"]
    if data["name"] in PUBLISHED:
        spec = PUBLISHED[data["name"]]
        test, val = spec.test, round(spec.train * data["val_fraction"])
        train = spec.train - val
    elif data["name"] == "scenes":
        train, val, test = SCENES["train"], SCENES["val"], SCENES["test"]
    else:
        test, val = (round(DIGITS_IMAGES * data[key]) for key in ("test_fraction", "val_fraction"))
        train = DIGITS_IMAGES - test - val
    train = max(1, round(train * data["train_fraction"]))
    batch = min(trainer["batch_size"], train)
    steps = trainer["steps"] or trainer["epochs"] * (train // batch)
    epochs = -(-steps // (train // batch))
    return steps * batch, val * (epochs // trainer["eval_every"] + 1) + test


def _probe(config: schema.Config, classes: int) -> tuple[float, float]:
    """Seconds an image of a training step, and of a forward alone."""
    # Neither the weights nor how frozen ones are stored change a step's time by much, and clustering takes seconds.
    plain: schema.Config = {
        **config,
        "model": {**config["model"], "pretrained": False},
        "method": {**config["method"], "frozen_bits": None},
    }
    trainer = config["trainer"]
    images = min(PROBE_IMAGES, trainer["micro_batch"] or trainer["batch_size"])
    step: Any = build_step(plain, classes, images, config["data"]["image_size"])
    synchronise = torch.cuda.synchronize if pick_device(trainer["device"]).type == "cuda" else lambda: None
    forwards, steps = [], []
    for _ in range(1 + PROBE_STEPS):  # the first compiles kernels
        synchronise()
        start = time.perf_counter()
        loss = step.forward()
        synchronise()
        forwards.append(time.perf_counter() - start)
        loss.backward()
        step.optimizer.step()
        step.optimizer.zero_grad()
        synchronise()
        steps.append(time.perf_counter() - start)
        if len(steps) > 1 and steps[-1] > LONG_STEP:
            break
    return min(steps[1:]) / images, min(forwards[1:]) / images


def duration(seconds: float) -> str:
    """Return a duration in the unit that a person would choose."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
