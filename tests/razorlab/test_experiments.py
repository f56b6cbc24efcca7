"""Every row of every table takes a real step on its data's own files, and a razored run fills every memory column."""

from __future__ import annotations

import gc
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, compose_plain
from tiny_bert import write_tiny_bert

from razorlab.commands import measure, tables
from razorlab.composition import content, options
from razorlab.data.published import PUBLISHED, PublishedSpec
from razorlab.data.published.install import install
from razorlab.records import read_record, run_directory
from razorlab.tables import load_runs
from razorlab.training.run import execute
from tests.datasets.tiny_archives import MAKERS, make_tiny

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


TRANSFORMERS = ("vit_b16", "timm")
# In their place: the same modules at 0.3 M parameters. One row steps ViT-B/16 itself.
SMALL_VIT = ("model=timm", "model.name=test_vit.r160_in1k", "model.pos_drop_rate=0.1", "model.mlp_drop_rate=0.1")
STEPS_VIT_B16 = "paper"


def read_experiment(name: str) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
    """The groups that an experiment chooses (group to option), and its trainer and razor sections."""
    found = content("experiment", name)
    assert found is not None
    groups = dict(item for entry in found["defaults"] for item in entry.items())
    return (
        {key.removeprefix("override /"): option for key, option in groups.items()},
        found["trainer"],
        found.get("razor", {}),
    )


def data_of(name: str) -> str:
    return read_experiment(name)[0].get("data", "digits")


def one_of_each_row() -> list[str]:
    """One experiment for each row: dense ones once for convolutional networks and once for transformers, razored ones
    once for each network.

    All data sets of a row walk the same code, so they take turns.
    """
    rows = defaultdict(list)
    for name in options()["experiment"]:
        groups, trainer, razor = read_experiment(name)
        kind = trainer.get("checkpointing", "none"), "micro_batch" in trainer, razor.get("fill")
        kind += razor.get("forward"), razor.get("selection"), groups.get("task")
        alone = groups["razor"] != "none" or groups["model"] == "tinytl"
        network = groups["model"] if alone else groups["model"] in TRANSFORMERS
        rows[network, groups["method"], groups["razor"], kind].append(name)
    used: Counter[str] = Counter()
    chosen = []
    for names in rows.values():
        chosen.append(min(names, key=lambda name: used[data_of(name)]))
        used[data_of(chosen[-1])] += 1
    return chosen


def test_every_data_set_has_its_row() -> None:
    assert {data_of(name) for name in one_of_each_row()} == {*MAKERS, "digits", "scenes"}


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, PublishedSpec]]:
    """Every published data set in miniature, set up: the folder for ``paths.data`` and what is known of each."""
    root = tmp_path_factory.mktemp("data")
    specs = {name: make_tiny(name, root / name) for name in MAKERS}
    for name, spec in specs.items():
        install(spec, root / name, say=lambda line: None)
    return root, specs


@pytest.mark.slow
@pytest.mark.parametrize("name", one_of_each_row())
def test_every_row_takes_a_step(
    tmp_path: Path, name: str, published: tuple[Path, dict[str, PublishedSpec]], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, specs = published
    for spec in specs.values():
        monkeypatch.setitem(PUBLISHED, spec.name, spec)
    groups, trainer, _ = read_experiment(name)
    settings = [*ONE_STEP, f"paths.outputs={tmp_path}", f"paths.data={data}"]
    if groups["data"] in specs:
        settings += ["data.val_fraction=0.5", "data.train_fraction=1", "model.pretrained=false"]
    if groups["model"] in TRANSFORMERS and groups["razor"] != STEPS_VIT_B16:
        settings += SMALL_VIT
    if groups.get("task") == "text":
        bert = write_tiny_bert(tmp_path / "bert")
        settings += ["task.tokens=16", "trainer.measure.image_size=null", "model.pretrained=true"]
        settings += ["model.name=tiny", f"model.weights={bert}"]
    if "micro_batch" in trainer:
        settings.append("trainer.micro_batch=2")
    config = compose_plain(f"experiment={name}", *settings)
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


@pytest.mark.slow
def test_rows_are_measured_in_turn_and_tabled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [text for text in TINY if not text.startswith(("razor=", "trainer.measure"))]
    for razor in ("none", "compact"):
        config = compose_plain(*common, *ONE_STEP, f"razor={razor}", f"paths.outputs={tmp_path}")
        execute(config)
    assert measure.main([str(tmp_path), "--repeats", "1", "--steps", "1"]) == 0
    runs = load_runs(tmp_path)
    assert (runs["peak_bytes"] > 0).all() and (runs["step_seconds"] > 0).all()
    memory = read_record(run_directory(config, None) / "record.json")["memory"]
    assert memory["interleaved_rows"] == 2 and memory["circumstances"]["threads"] > 0
    assert tables.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "full, dense" in shown and "full, compact 0.9" in shown and "not measured" not in shown
