"""SIGKILL at twenty random points, counted in calls and not in seconds, in the middle of checkpoints too: the run goes
on to the same bits."""

from __future__ import annotations

import csv
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, compose_plain
from forked import start_config, start_counted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_processes import wait_for

from razorlab.records import outcome, read_record, run_directory

RUN = (
    *("trainer.steps=10", "trainer.batch_size=24", "data.train_fraction=0.08", "trainer.save_every=1", "optim.lr=0.01"),
    *("data.train_transform=random_crop", "data.flip=true", "model.drop_rate=0.3", "optim.warmup_steps=2"),
    *("data.val_fraction=0.02", "data.test_fraction=0.02"),
)
CHECKPOINTS = 10  # at least: one per step; the best ones are a few more
CHAINS, KILLS = 4, 5  # runs, and how often each is killed before it may end


def event(draw: random.Random, turn: int, whole: dict[str, int]) -> dict[str, int]:
    """Where to die, counted from the start of a process: at any call, later ones in later turns, so that a run does not
    end before its last turn; or within one of the next two checkpoints."""
    if turn % 2:
        return {"writes": draw.randrange(1, 2 * whole["writes"] // CHECKPOINTS)}
    return {"calls": draw.randrange(1, whole["calls"] * (turn + 1) // KILLS)}


def leftovers(folder: Path) -> dict[str, Any]:
    """Everything that two equal runs must agree in, bit for bit."""
    newest, best = (max(folder.glob(f"checkpoints/{kind}-*.pt")) for kind in ("step", "best"))
    state = torch.load(newest, weights_only=True)
    del state["step_seconds"], state["tally"]["seconds"]
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    for row in rows:
        del row["images_per_second"]
    return {
        "names": [path.name for path in sorted((folder / "checkpoints").iterdir())],
        "state": state,
        "best": torch.load(best, weights_only=True),
        "metrics": rows,
        "record": outcome(read_record(folder / "record.json")) | {"config": None},  # it names the output folder
    }


def assert_same(first: Any, second: Any, name: str) -> None:
    assert type(first) is type(second), name
    if isinstance(first, dict):
        assert list(first) == list(second), name
        for key, value in first.items():
            assert_same(value, second[key], f"{name}.{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), name
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same(a, b, f"{name}.{index}")
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second), name
    else:
        assert first == second, name


def curve(folder: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/step_loss")]


@dataclass(frozen=True)
class Whole:
    """A run that nothing disturbs: what it leaves, and how many events it has."""

    left: dict[str, Any]
    events: dict[str, int]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    config = compose_plain(*TINY, *RUN, f"paths.outputs={folder}")
    assert start_counted(folder, config, folder / "counts").end()[0] == 0
    counted = dict(line.split() for line in (folder / "counts").read_text().splitlines())
    assert len(curve(run_directory(config, None))) == 10
    return Whole(leftovers(run_directory(config, None)), {name: int(number) for name, number in counted.items()})


@pytest.mark.parametrize("chain", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in range(1, CHAINS))])
def test_kills_at_random_points_change_nothing(tmp_path: Path, whole: Whole, chain: int) -> None:
    config = compose_plain(*TINY, *RUN, f"paths.outputs={tmp_path}")
    folder, draw, cut_short, halves = run_directory(config, None), random.Random(chain), 0, 0
    for turn in range(KILLS):
        job = start_counted(tmp_path, config, tmp_path / "counts", event(draw, turn, whole.events))
        cut_short += job.end()[0] == -signal.SIGKILL
        halves += any(folder.glob("checkpoints/*.part"))
    assert start_config(tmp_path, config).end()[0] == 0
    assert_same(whole.left, leftovers(folder), f"run {chain}")
    assert cut_short > KILLS / 2 and halves, (cut_short, halves)


def test_tensorboard_curves_have_each_step_once_after_a_kill(tmp_path: Path) -> None:
    config = compose_plain(*TINY, *RUN, f"paths.outputs={tmp_path}")
    folder = run_directory(config, None)
    job = start_config(tmp_path, config)
    wait_for(tmp_path, job, step=5)
    job.process.kill()
    job.end()
    begun = max(int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*"))
    while int(time.time()) <= begun:  # event files are ordered by the second they were begun in
        time.sleep(0.01)
    assert start_config(tmp_path, config).end()[0] == 0
    assert [step for step, _ in curve(folder)] == list(range(1, 11))
