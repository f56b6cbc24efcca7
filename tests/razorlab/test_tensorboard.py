"""What a run shows in TensorBoard, read back from its event file."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, compose_plain
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import backrazor as br
from razorlab.records import read_record, run_directory
from razorlab.training import watch
from razorlab.training.run import execute

RUN = (*TINY, "razor=compact", "razor.sparsity=0.9", "trainer.steps=40", "trainer.batch_size=100", "optim.lr=1e-3")
SIZES = {"scalars": 0, "images": 0, "tensors": 0}  # 0: all of them


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = compose_plain(*RUN, "trainer.measure.mode=saved", f"paths.outputs={tmp_path_factory.mktemp('out')}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "POINTS", 5)
        execute(config)
    torch.set_num_threads(threads)
    return run_directory(config, None)


@pytest.fixture(scope="module")
def events(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run), SIZES).Reload()


def test_curves_are_those_of_the_metrics_file(run: Path, events: EventAccumulator) -> None:
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    for tag, column in {
        "train/loss": "train_loss",
        "train/top1": "train_top1",
        "val/loss": "val_loss",
        "val/top1": "val_top1",
        "speed/images_per_second": "images_per_second",
    }.items():
        points = events.Scalars(tag)
        assert [point.step for point in points] == [int(row["step"]) for row in rows]
        assert [point.value for point in points] == pytest.approx([float(row[column]) for row in rows], rel=1e-5)
    for tag in ("train/lr", "train/step_loss"):
        assert [point.step for point in events.Scalars(tag)] == list(range(1, 41))


def test_memory_and_final_metrics_are_those_of_the_record(run: Path, events: EventAccumulator) -> None:
    record = read_record(run / "record.json")
    for tag, value in {
        "memory/saved_bytes": record["memory"]["saved_bytes"],
        "memory/predicted_peak_bytes": record["memory"]["predicted_peak_bytes"],
        "memory/weight_bytes": record["memory"]["weight_bytes"],
        "memory/gradient_bytes": record["memory"]["gradient_bytes"],
        "memory/optimizer_bytes": record["memory"]["optimizer_bytes"],
        "final/test_top1": record["test"]["top1"],
    }.items():
        (point,) = events.Scalars(tag)
        assert point.value == pytest.approx(value, rel=1e-6) and value > 0
    assert any(tag.startswith("_hparams_") for tag in events.summary_metadata)


def test_every_layer_has_its_sparsity_and_kept_energy_over_time(events: EventAccumulator) -> None:
    tags = events.Tags()["scalars"]
    layers = [tag.removeprefix("sparsity/") for tag in tags if tag.startswith("sparsity/")]
    assert "conv_stem" in layers and "classifier" in layers and len(layers) > 5
    pruned = set()
    for layer in layers:
        sparsity, energy = events.Scalars(f"sparsity/{layer}"), events.Scalars(f"kept_energy/{layer}")
        assert [point.step for point in sparsity] == [point.step for point in energy] == list(range(1, 41, 8))
        assert all(0 <= point.value <= 1 for point in sparsity), layer  # what is kept whole has none
        pruned |= {layer} if all(point.value > 0.25 for point in sparsity) else set()  # a gate has few inputs
        assert all(0.05 < point.value < 1.1 or math.isnan(point.value) for point in energy), layer
    assert len(pruned) > 5


def test_pictures_are_there(events: EventAccumulator) -> None:
    for tag in ("memory_by_layer", "test_images"):
        (picture,) = events.Images(tag)
        assert picture.step == 40 and min(picture.width, picture.height) > 300
        assert len(Image.open(io.BytesIO(picture.encoded_image_string)).convert("RGB").getcolors(1 << 24)) > 20


def test_one_forward_of_a_step_in_training_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "POINTS", 2)
    model = torch.nn.Sequential(torch.nn.Linear(32, 4))
    br.razor_(model)
    course, seen = SimpleNamespace(step=0, total_steps=4), []
    curves = SimpleNamespace(scalar=lambda name, value, step: seen.append((name, step)))
    with watch.watched_layers(model, course, curves):
        for course.step in range(6):  # two more than the run has: what is measured afterwards is no part of it
            for _ in range(3):  # micro-batches
                model(torch.randn(2, 32))
            with torch.no_grad():
                model(torch.randn(2, 32))
            model.eval()(torch.randn(2, 32))
            model.train()
    assert seen == [(f"{name}/0", step) for step in (1, 3) for name in ("sparsity", "kept_energy")]
    assert not model._forward_hooks and not model._forward_pre_hooks and not model[0]._forward_hooks


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 4))
    br.razor_(model)
    course, curves = SimpleNamespace(step=0, total_steps=1), SimpleNamespace(scalar=lambda *_: None)
    with watch.watched_layers(model, course, curves), pytest.raises(RuntimeError):
        model(torch.randn(2, 31))
    assert not model[0]._forward_hooks
