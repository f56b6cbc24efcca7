"""SIGKILL at twenty random points, counted in calls and not in seconds, in the middle of checkpoints too: the run goes
on to the same bits."""

from __future__ import annotations

import csv
import random
import time
from pathlib import Path
from typing import Any

import torch
from conftest import TINY, compose_plain
from forked import start_config, start_counted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_processes import wait_for

from transfer.records import outcome, read_record, run_directory

RUN = (
    *("trainer.steps=10", "trainer.batch_size=24", "data.train_fraction=0.08", "trainer.save_every=1", "optim.lr=0.01"),
    *("data.train_transform=random_crop", "data.flip=true", "model.drop_rate=0.3", "optim.warmup_steps=2"),
    *("data.val_fraction=0.02", "data.test_fraction=0.02"),
)
CHECKPOINTS = 10  # at least: one per step; the best ones are a few more
CHAINS, KILLS = 4, 5  # runs, and how often each is killed before it may end


def event(draw: random.Random, turn: int, whole: dict[str, int]) -> dict[str, int]:
    """Where to die, counted from the start of a process: at any call, or within one of the next two checkpoints."""
    if turn % 2:
        return {"writes": draw.randrange(1, 2 * whole["writes"] // CHECKPOINTS)}
    return {"calls": draw.randrange(1, whole["calls"])}


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


def test_twenty_kills_at_random_points_change_nothing(tmp_path: Path) -> None:
    configs = [compose_plain(*TINY, *RUN, f"paths.outputs={tmp_path}/{name}") for name in ("whole", *range(CHAINS))]
    assert start_counted(tmp_path / "whole", configs[0], tmp_path / "counts").end()[0] == 0
    counted = dict(line.split() for line in (tmp_path / "counts").read_text().splitlines())
    events = {name: int(number) for name, number in counted.items()}
    whole = run_directory(configs[0], None)
    expected = leftovers(whole)
    assert len(curve(whole)) == 10
    draw, cut_short, halves = random.Random(0), 0, 0
    for number, config in enumerate(configs[1:]):
        folder = run_directory(config, None)
        for turn in range(KILLS):
            job = start_counted(tmp_path / str(number), config, tmp_path / "counts", event(draw, turn, events))
            cut_short += job.end()[0] == -9
            halves += any(folder.glob("checkpoints/*.part"))
        assert start_config(tmp_path / str(number), config).end()[0] == 0
        assert_same(expected, leftovers(folder), f"run {number}")
    assert cut_short >= CHAINS * KILLS / 2 and halves >= CHAINS, (cut_short, halves)


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
