"""Every experiment file takes a real step, and a razored run fills every memory column."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from conftest import TINY, compose_plain

import train
from scripts import make_tables, measure_runs
from transfer.records import read_record, run_directory
from transfer.tables import load_runs
from transfer.training.run import execute

ONE_STEP = (
    "trainer.steps=1",
    "trainer.batch_size=4",
    "trainer.micro_batch=null",
    "trainer.progress=false",
    "trainer.resume=never",
    "data.image_size=32",
    "data.val_fraction=0.01",
    "data.test_fraction=0.01",
    "data.train_fraction=0.05",
    "trainer.measure.mode=saved",
    "trainer.measure.batch_size=2",
    "trainer.measure.image_size=32",
)


@pytest.mark.parametrize("name", train.group_options()["experiment"])
def test_every_experiment_takes_a_step(tmp_path: Path, name: str) -> None:
    config = compose_plain(f"experiment={name}", *ONE_STEP, f"paths.outputs={tmp_path}")
    record = execute(config, name)
    assert record["steps"] == 1 and record["experiment"] == name
    memory = record["memory"]
    assert memory["saved_bytes"] > 0
    if config["trainer"]["checkpointing"] == "none":
        assert memory["predicted_bytes"] == memory["saved_bytes"]
    assert (run_directory(config, name) / "razor.txt").exists() == (config["razor"]["name"] != "none")


@pytest.mark.parametrize("razor", ["paper", "compact", "int8"])
def test_every_preset_trains_and_saves_less_than_dense(tmp_path: Path, razor: str) -> None:
    common = [text for text in TINY if not text.startswith(("razor=", "trainer.measure"))]
    saved = {}
    for name in ("none", razor):
        config = compose_plain(
            *common,
            *ONE_STEP,
            f"razor={name}",
            f"paths.outputs={tmp_path}",
            "trainer.steps=3",
            "method.bn_affine=frozen",
            "method.bn_stats=frozen",
        )
        saved[name] = execute(config)["memory"]["saved_bytes"]
    assert saved[razor] < 0.5 * saved["none"]


def tensors_in_a_graph() -> int:
    """Count the live tensors that an operator made. By type: isinstance would wake lazy modules among the objects."""
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) and thing.grad_fn is not None for thing in gc.get_objects())


@pytest.mark.parametrize("razor", ["none", "compact"])
def test_a_finished_run_leaves_no_activation_behind(tmp_path: Path, razor: str) -> None:
    common = [text for text in TINY if not text.startswith(("razor=", "trainer.measure"))]
    config = compose_plain(*common, *ONE_STEP, f"razor={razor}", f"paths.outputs={tmp_path}")
    before = tensors_in_a_graph()
    execute(config)
    assert tensors_in_a_graph() <= before, "a sweep would pile them up"


def test_rows_are_measured_in_turn_and_tabled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [text for text in TINY if not text.startswith(("razor=", "trainer.measure"))]
    for razor in ("none", "compact"):
        config = compose_plain(*common, *ONE_STEP, f"razor={razor}", f"paths.outputs={tmp_path}")
        execute(config)
    assert measure_runs.main([str(tmp_path), "--repeats", "1", "--steps", "1"]) == 0
    runs = load_runs(tmp_path)
    assert (runs["peak_bytes"] > 0).all() and (runs["step_seconds"] > 0).all()
    memory = read_record(run_directory(config, None) / "record.json")["memory"]
    assert memory["interleaved_rows"] == 2 and memory["circumstances"]["threads"] > 0
    assert make_tables.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "full, dense" in shown and "full, compact 0.9" in shown and "not measured" not in shown
