"""Bad numbers are named or skipped, good ones are the same twice."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, compose_plain
from torch import nn

import train
from transfer.records import config_hash, outcome, read_record, run_directory
from transfer.training import step
from transfer.training.network import Network
from transfer.training.run import execute

RUN = ("trainer.epochs=2", "trainer.batch_size=30", "data.train_fraction=0.06", "optim=sgd", "optim.lr=0.01")
RAZORED = ("razor=compact", "razor.sparsity=0.5")


def spoil_activation(network: Network) -> None:
    """One forward through a layer inside brings NaN."""

    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output * math.nan if once(module) else output

    network.model.get_submodule("blocks.1.0").register_forward_hook(hook)


def spoil_gradient(network: Network) -> None:
    """One backward through a weight brings Inf."""
    network.model.get_parameter("conv_head.weight").register_hook(lambda g: g * math.inf if once(network) else g)


def once(owner: object) -> bool:
    """Whether this is the third training step's call."""
    if isinstance(owner, nn.Module) and not torch.is_grad_enabled():
        return COUNTS.get("bad", False)  # the look for the layer meets it again
    COUNTS["calls"] = COUNTS.get("calls", 0) + 1
    COUNTS["bad"] = COUNTS["calls"] == 3
    return COUNTS["bad"]


COUNTS: dict[str, int] = {}


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Network], None]], None]:
    """Have every network that a trainer is given spoilt in its third step."""

    def apply(spoil: Callable[[Network], None]) -> None:
        COUNTS.clear()
        plain = step.Stepper.__init__

        def spoilt(self: step.Stepper, network: Network, *rest: object) -> None:
            spoil(network)
            plain(self, network, *rest)

        monkeypatch.setattr(step.Stepper, "__init__", spoilt)

    return apply


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(spoil_activation, ("the loss is nan", "blocks.")), (spoil_gradient, ("the gradient of conv_head.weight",))],
)
@pytest.mark.parametrize("razor", [(), RAZORED], ids=["dense", "razored"])
def test_a_bad_step_ends_the_run_with_step_layer_and_last_checkpoint(
    command, tmp_path: Path, spoiled, spoil: Callable, words: tuple[str, ...], razor: tuple[str, ...]
) -> None:
    spoiled(spoil)
    code, lines = command(*TINY, *RUN, *razor, "trainer.save_every=1")
    assert code == train.NOT_FINITE
    assert lines[-1].startswith("train.py: step 3: ") and "step-00000002.pt" in lines[-1]
    for word in (*words, "trainer.nonfinite=skip"):
        assert word in lines[-1]
    weights = torch.load(next(tmp_path.rglob("step-00000002.pt")), weights_only=True)["model"]
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize("spoil", [spoil_activation, spoil_gradient])
def test_skipping_leaves_the_step_out_counts_it_and_keeps_weights_and_statistics(
    tmp_path: Path, spoiled, spoil: Callable
) -> None:
    spoiled(spoil)
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
    from transfer.data import build_data
    from transfer.training.sampling import BatchOrder, train_loader

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
