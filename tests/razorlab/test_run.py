"""Whole runs in this process: what they write, that they can be repeated, interrupted and gone on with."""

from __future__ import annotations

import csv
import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, compose_plain, files_below
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from razorlab.commands import train
from razorlab.records import run_directory
from razorlab.training import loop
from razorlab.training.monitor import Monitor
from razorlab.training.run import execute
from razorlab.training.sampling import BatchOrder

STEPS = ("trainer.epochs=3", "trainer.batch_size=100", "data.train_fraction=0.15", "optim.lr=0.01")


def run(tmp_path: Path, *overrides: str) -> tuple[dict, Path]:
    config = compose_plain(*TINY, *STEPS, f"paths.outputs={tmp_path}", *overrides)
    return execute(config), run_directory(config, None)


def weights(folder: Path, kind: str = "step") -> dict[str, torch.Tensor]:
    return torch.load(max(folder.glob(f"checkpoints/{kind}-*.pt")), weights_only=True)["model"]


def metrics(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_run_leaves_its_record_metrics_log_events_and_checkpoints(tmp_path: Path) -> None:
    record, folder = run(tmp_path)
    kept = [path.stem.partition("-") for path in (folder / "checkpoints").iterdir()]
    assert {kind for kind, _, _ in kept} == {"best", "step"} and max(int(step) for _, _, step in kept) == record[
        "steps"
    ]
    assert {"config.yaml", "log.txt", "metrics.csv", "record.json"} <= set(files_below(folder))
    assert json.loads((folder / "record.json").read_text()) == {"schema": 1, **record}
    assert {"git_commit", "versions", "device", "date", "threads"} <= set(record["circumstances"])
    rows = metrics(folder)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"] and float(rows[-1]["train_loss"]) > 0
    assert 0 <= record["test"]["top1"] <= record["test"]["top5"] <= 100 and record["test"]["images"] == 90
    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert {"train/step_loss", "train/lr", "val/top1", "speed/images_per_second", "final/test_top1"} <= set(scalars)
    assert [event.step for event in events.Scalars("train/step_loss")] == list(range(1, record["steps"] + 1))
    assert "_hparams_/experiment" in events.summary_metadata


def test_same_seed_same_weights_other_seed_others(tmp_path: Path) -> None:
    results = [
        run(tmp_path / str(i), f"seed={seed}", "model.drop_rate=0.2", "trainer.deterministic=true")
        for i, seed in enumerate((1, 1, 2))
    ]
    first, again, other = (weights(folder) for _, folder in results)
    assert same(first, again) and not same(first, other)


def test_an_interrupted_run_goes_on_to_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("model.drop_rate=0.2", "data.train_transform=random_crop")
    whole, whole_folder = run(tmp_path / "whole", *settings)
    save = loop.Trainer._save

    def save_then_die(trainer: loop.Trainer, monitor: Monitor) -> None:
        save(trainer, monitor)
        if trainer.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Trainer, "_save", save_then_die)
        run(tmp_path / "cut", *settings)
    resumed, folder = run(tmp_path / "cut", *settings)
    assert "resumed after epoch 2" in (folder / "log.txt").read_text()
    assert same(weights(whole_folder), weights(folder)) and same(weights(whole_folder, "best"), weights(folder, "best"))
    assert (resumed["val"], resumed["test"], resumed["best_epoch"]) == (
        whole["val"],
        whole["test"],
        whole["best_epoch"],
    )
    columns = ("epoch", "step", "train_loss", "val_top1")
    read = [[[row[column] for column in columns] for row in metrics(f)] for f in (whole_folder, folder)]
    assert read[0] == read[1]


def test_the_official_protocol_reports_the_last_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs whose accuracy is told to fall tell the last weights from the best."""
    caplog.set_level("INFO", logger="razorlab")
    score, told = loop.Trainer._score, itertools.count()
    monkeypatch.setattr(loop.Trainer, "_score", lambda *given: replace(score(*given), top1=90.0 - next(told)))
    settings = ("trainer.epochs=3", "data.protocol=official")
    record, folder = run(tmp_path, *settings)
    assert record["best_epoch"] == 3 and "epoch 3 is the last" in caplog.text
    assert same(weights(folder), weights(folder, "best"))
    record, folder = run(tmp_path, "trainer.epochs=3")
    assert record["best_epoch"] == 1 and "epoch 1 selected on validation" in caplog.text
    assert not same(weights(folder), weights(folder, "best"))


def test_a_finished_run_is_returned_and_never_starts_it_over(tmp_path: Path) -> None:
    first, folder = run(tmp_path)
    stamp = (folder / "record.json").stat().st_mtime_ns
    assert run(tmp_path)[0]["circumstances"] == first["circumstances"]
    assert (folder / "record.json").stat().st_mtime_ns == stamp
    run(tmp_path, "trainer.resume=never")
    assert (folder / "record.json").stat().st_mtime_ns != stamp


def test_a_foreign_or_damaged_checkpoint_is_refused(tmp_path: Path, command, caplog: pytest.LogCaptureFixture) -> None:
    _, folder = run(tmp_path / "outputs")
    (folder / "record.json").unlink()
    other = run_directory(compose_plain(*TINY, *STEPS, "optim.lr=0.02", f"paths.outputs={tmp_path}/outputs"), None)
    shutil.copytree(folder / "checkpoints", other / "checkpoints")
    code, lines = command(*TINY, *STEPS, "optim.lr=0.02")
    assert code == 2 and "belongs to configuration" in lines[-1] and "trainer.resume=never" in lines[-1]
    newest = max((folder / "checkpoints").glob("step-*.pt"))
    newest.write_bytes(newest.read_bytes()[:-200])
    code, lines = command(*TINY, *STEPS)
    assert code == 0 and f"{newest.name} is damaged" in caplog.text
    assert "resumed after epoch 2" in (folder / "log.txt").read_text(), "the one before is used"
    (folder / "record.json").unlink()
    for path in (folder / "checkpoints").glob("step-*.pt"):
        path.write_bytes(b"damaged")
    code, lines = command(*TINY, *STEPS)
    assert code == 2 and "so is every other checkpoint" in lines[-1]


@pytest.mark.parametrize("micro", [50, 32])
def test_micro_batches_give_the_step_of_the_whole_batch(tmp_path: Path, micro: int) -> None:
    settings = ("method.bn_stats=frozen", "trainer.steps=2", "optim=sgd")
    _, whole = run(tmp_path / "whole", *settings)
    _, parts = run(tmp_path / "parts", *settings, f"trainer.micro_batch={micro}")
    for name, value in weights(whole).items():
        assert torch.allclose(value, weights(parts)[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("method", ["full", "last", "norm_last", "bias"])
@pytest.mark.parametrize("optim", ["adam", "adamw", "sgd"])
def test_every_method_and_optimizer_changes_what_trains_and_nothing_else(
    tmp_path: Path, method: str, optim: str
) -> None:
    settings = (
        f"method={method}",
        f"optim={optim}",
        "method.bn_stats=frozen",
        "trainer.steps=3",
        "optim.lr=0.1",
        "optim.grad_clip=1",
        "optim.head_lr_multiplier=10",
        "optim.warmup_steps=0",
    )
    config = compose_plain(*TINY, *STEPS, f"paths.outputs={tmp_path}", *settings)
    before: dict[str, torch.Tensor] = {}
    trained: set[str] = set()

    class Watched(loop.Trainer):
        def resume(self) -> None:
            before.update({k: v.clone() for k, v in self.network.model.state_dict().items()})
            trained.update(k for k, p in self.network.model.named_parameters() if p.requires_grad)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("razorlab.training.run.Trainer", Watched)
        execute(config)
    after = weights(run_directory(config, None))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed <= trained and "classifier.weight" in changed
    assert len(changed) > 0.6 * len(trained)


@pytest.mark.parametrize("warmup", [0, 2])
def test_learning_rate_warms_up_and_falls_to_zero_by_step(tmp_path: Path, warmup: int) -> None:
    """The rates of the released code, whose warm-up counts from one and whose cosine without one from zero."""
    _, folder = run(tmp_path, f"optim.warmup_steps={warmup}", "trainer.epochs=5")
    events = EventAccumulator(str(folder))
    events.Reload()
    rates = [event.value for event in events.Scalars("train/lr")]
    steps = len(rates)
    taken = range(1, steps + 1) if warmup else range(steps)
    cosine = [0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) for step in taken]
    wanted = [step / warmup if step < warmup else factor for step, factor in zip(taken, cosine, strict=True)]
    assert rates == pytest.approx([0.01 * factor for factor in wanted], abs=1e-8)
    assert rates[0] == pytest.approx(0.005 if warmup else 0.01)


def test_the_last_batch_of_an_epoch_may_be_part_of_one(tmp_path: Path) -> None:
    """Its loss is the mean over the images that it has; every image of the epoch is seen once."""
    settings = ("trainer.epochs=1", "trainer.batch_size=100", "data.train_fraction=0.15", "method.bn_stats=frozen")
    dropped, _ = run(tmp_path, *settings)
    kept, folder = run(tmp_path, *settings, "trainer.drop_last=false")
    assert (dropped["steps"], kept["steps"]) == (2, 3)
    order = BatchOrder(243, 100, 0, drop_last=False)
    batches = list(order)
    assert [len(batch) for batch in batches] == [order.images(number) for number in range(3)] == [100, 100, 43]
    assert sorted(index for batch in batches for _, index in batch) == list(range(243))
    events = EventAccumulator(str(folder))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/step_loss")]
    (row,) = metrics(folder)
    whole = sum(loss * count for loss, count in zip(losses, (100, 100, 43), strict=True)) / 243
    assert float(row["train_loss"]) == pytest.approx(whole, rel=1e-6)
    assert losses[-1] == pytest.approx(losses[0], rel=0.3), "not a sum over 43 of 100 images"


def test_a_last_batch_of_fewer_images_than_processes_is_left_out() -> None:
    assert [len(BatchOrder(203, 100, 0, rank, 4, drop_last=False)) for rank in range(4)] == [2] * 4
    shares = [list(BatchOrder(205, 100, 0, rank, 4, drop_last=False))[-1] for rank in range(4)]
    assert [len(share) for share in shares] == [2, 1, 1, 1]


def test_a_loss_that_is_not_finite_stops_the_run_with_code_three(command, tmp_path: Path) -> None:
    code, lines = command(*TINY, *STEPS, "optim=sgd", "optim.lr=1e30", "trainer.epochs=20")
    assert code == train.NOT_FINITE and "not finite" in lines[-1] and "optim.lr=1e+30" in lines[-1]
    assert not list(tmp_path.rglob("record.json"))


def test_bfloat16_autocast_and_checkpointing_run(tmp_path: Path) -> None:
    record, _ = run(tmp_path, "trainer.precision=bfloat16", "trainer.checkpointing=block", "trainer.steps=2")
    assert record["steps"] == 2


def test_data_workers_see_the_same_images(tmp_path: Path) -> None:
    _, alone = run(tmp_path / "alone", "trainer.steps=2")
    _, helped = run(tmp_path / "helped", "trainer.steps=2", "trainer.workers=2")
    assert same(weights(alone), weights(helped))


def test_sweep_over_seeds_makes_one_folder_each(command, tmp_path: Path) -> None:
    code, lines = command("-m", "seed=1,2", *TINY, *STEPS, "trainer.steps=1")
    assert code == 0, lines
    seeds = sorted(json.loads(path.read_text())["seed"] for path in (tmp_path / "outputs").rglob("record.json"))
    assert seeds == [1, 2]
