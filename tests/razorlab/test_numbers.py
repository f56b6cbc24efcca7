"""Bad numbers are named or skipped, good ones are the same twice."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import TINY, compose_plain

from razorlab.commands import train
from razorlab.records import config_hash, outcome, read_record, run_directory
from razorlab.training import step
from razorlab.training.network import Network
from razorlab.training.run import execute

RUN = ("trainer.epochs=2", "trainer.batch_size=30", "data.train_fraction=0.06", "optim=sgd", "optim.lr=0.01")
RAZORED = ("razor=compact", "razor.sparsity=0.5")


class Spoiler:
    """Brings one bad number into the third training step of the network that it is given."""

    def __init__(self, where: str) -> None:
        self.where, self.calls, self.networks = where, 0, 0

    def __call__(self, network: Network) -> None:
        self.networks += 1
        if self.where == "activation":  # NaN, by a forward through a layer inside
            network.model.get_submodule("blocks.1.0").register_forward_hook(
                lambda _, __, output: output * math.nan if self.is_now() else output
            )
        else:  # Inf, by a backward through a weight
            network.model.get_parameter("conv_head.weight").register_hook(
                lambda g: g * math.inf if self.is_now() else g
            )

    def is_now(self) -> bool:
        if self.where == "gradient" or torch.is_grad_enabled():  # else the look for the layer, which meets it again
            self.calls += 1
        return self.calls == 3


@pytest.fixture(params=["activation", "gradient"])
def spoiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Spoiler:
    """Has the network that a trainer is given spoilt."""
    spoil, plain = Spoiler(request.param), step.Stepper.__init__

    def spoilt(self: step.Stepper, network: Network, *rest: object) -> None:
        spoil(network)
        plain(self, network, *rest)

    monkeypatch.setattr(step.Stepper, "__init__", spoilt)
    return spoil


WORDS = {"activation": ("the loss is nan", "blocks."), "gradient": ("the gradient of conv_head.weight",)}


@pytest.mark.parametrize("razor", [(), RAZORED], ids=["dense", "razored"])
def test_a_bad_step_ends_the_run_with_step_layer_and_last_checkpoint(
    command, tmp_path: Path, spoiler: Spoiler, razor: tuple[str, ...]
) -> None:
    code, lines = command(*TINY, *RUN, *razor, "trainer.save_every=1")
    assert code == train.NOT_FINITE, lines
    assert (spoiler.networks, spoiler.calls) == (1, 3), lines
    assert lines[-1].startswith("train.py: step 3: ") and "step-00000002.pt" in lines[-1], lines
    for word in (*WORDS[spoiler.where], "trainer.nonfinite=skip"):
        assert word in lines[-1], lines
    weights = torch.load(next(tmp_path.rglob("step-00000002.pt")), weights_only=True)["model"]
    assert [name for name, value in weights.items() if not value.isfinite().all()] == []


def test_skipping_leaves_the_step_out_counts_it_and_keeps_weights_and_statistics(
    tmp_path: Path, spoiler: Spoiler
) -> None:
    config = compose_plain(*TINY, *RUN, "trainer.nonfinite=skip", f"paths.outputs={tmp_path}")
    record = execute(config)
    assert record["skipped_steps"] == 1 and record["steps"] == 6
    folder = run_directory(config, None)
    assert "step 3 is skipped" in (folder / "log.txt").read_text()
    state = torch.load(max(folder.glob("checkpoints/step-*.pt")), weights_only=True)
    assert state["skipped"] == 1 and all(value.isfinite().all() for value in state["model"].values())
    assert all(math.isfinite(float(record[split]["loss"])) for split in ("val", "test"))


def test_deterministic_runs_leave_identical_records(tmp_path: Path) -> None:
    settings = ("trainer.deterministic=true", "model.drop_rate=0.3", "data.train_transform=random_crop")
    records = []
    for folder in ("first", "second"):
        config = compose_plain(
            *TINY, *RUN, *RAZORED, *settings, f"paths.outputs={tmp_path / folder}", "trainer.measure.mode=saved"
        )
        execute(config)
        record = outcome(read_record(run_directory(config, None) / "record.json"))
        del record["config"]["paths"]
        records.append(record)
    assert records[0] == records[1] and records[0]["memory"]["saved_bytes"] > 0


def test_augmentation_depends_on_seed_epoch_and_image_alone(tmp_path: Path) -> None:
    from razorlab.data import build_data
    from razorlab.training.sampling import BatchOrder, train_loader

    config = compose_plain(
        *TINY, "data.train_transform=random_crop", "data.color_jitter=0.4", "data.train_fraction=0.1"
    )
    images = build_data(config["data"], config["paths"]).train

    def epoch(number: int, first: int = 0, workers: int = 0, seed: int = 1) -> torch.Tensor:
        order = BatchOrder(len(images), 20, seed)
        order.epoch, order.first = number, first
        return torch.cat([x for x, _ in train_loader(images, order, seed, num_workers=workers)])

    before = torch.get_rng_state()
    whole = epoch(1)
    assert torch.equal(torch.get_rng_state(), before), "the draws of dropout are not touched"
    assert torch.equal(whole[60:], epoch(1, first=3)) and torch.equal(whole, epoch(1, workers=2))
    assert not torch.equal(whole, epoch(2)) and not torch.equal(whole, epoch(1, seed=2))


def test_later_keys_do_not_move_the_folders_of_earlier_runs() -> None:
    config = compose_plain("razor.sparsity=0.9")
    earlier = {**config, "trainer": {**config["trainer"]}}
    for key in ("save_every", "keep", "nonfinite"):
        del earlier["trainer"][key]
    assert config_hash(config) == config_hash(earlier)
    assert config_hash(compose_plain("razor.sparsity=0.9", "trainer.nonfinite=skip")) != config_hash(config)
