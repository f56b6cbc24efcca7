"""What a step asks of its device: one read for what is logged, copies that do not wait, constants made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TINY, compose_plain
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from razorlab.records import config_hash, run_directory
from razorlab.training import network as network_module
from razorlab.training.costs import build_step
from razorlab.training.distributed import World
from razorlab.training.evaluation import evaluate
from razorlab.training.network import assemble
from razorlab.training.optimisation import make_optimizer
from razorlab.training.run import execute
from razorlab.training.sampling import worker_count
from razorlab.training.step import MOST_OVERFLOWS, Stepper

SHORT = ("trainer.batch_size=30", "data.train_fraction=0.06", "trainer.steps=3", "optim=sgd", "optim.lr=0.01")


class Reads(TorchDispatchMode):
    """Counts the reads of single numbers: ``float``, ``int``, ``bool`` and ``item`` of a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


class Moves(TorchFunctionMode):
    """Notes whether each move of a batch of images (uint8, four dimensions) to a device waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[bool] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        images = function is torch.Tensor.to and args[0].dtype == torch.uint8 and args[0].dim() == 4
        if images and isinstance(args[1], torch.device):
            self.waits.append(not (kwargs or {}).get("non_blocking", False))
        return function(*args, **(kwargs or {}))


def stepper(*overrides: str) -> Stepper:
    config = compose_plain(*TINY, "optim=sgd", *overrides)
    network = assemble(config, 5)
    return Stepper(network, make_optimizer(network.model, network.backbone.head, config["optim"]), config, 8, World())


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 5


@pytest.mark.parametrize("razor", [(), ("razor=compact", "razor.sparsity=0.5")], ids=["plain", "razored"])
@pytest.mark.parametrize("micro", [(), ("trainer.micro_batch=2",)], ids=["whole", "micro-batches"])
def test_a_step_reads_its_device_once(
    monkeypatch: pytest.MonkeyPatch, razor: tuple[str, ...], micro: tuple[str, ...]
) -> None:
    monkeypatch.setattr("backrazor.functional.rest.on_cuda", lambda device: True)
    trained, lists = stepper(*razor, *micro), []
    trained.take(*batch())  # makes the constants
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(1) or tolist(tensor))
    with Reads() as reads:
        outcome = trained.take(*batch())
    assert outcome.problem is None and outcome.loss > 0
    assert (reads.count, len(lists)) == (0, 1)


def test_evaluation_reads_its_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network, lists = assemble(compose_plain(*TINY), 5), []
    with Moves() as moves:
        evaluate(network, [batch(), batch()], torch.device("cpu"), "float32")
    assert moves.waits == [False] * 2
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(1) or tolist(tensor))
    with Reads() as reads:
        scores = evaluate(network, [batch(), batch()], torch.device("cpu"), "float32")
    assert scores.images == 16 and (reads.count, len(lists)) == (0, 1)


def test_batches_move_to_the_device_without_waiting(tmp_path: Path) -> None:
    with Moves() as moves:
        execute(compose_plain(*TINY, *SHORT, f"paths.outputs={tmp_path}"))
    assert moves.waits and sum(moves.waits) <= 1, "the figure of test images alone may wait"


def test_constants_of_the_normalisation_are_made_once() -> None:
    network = assemble(compose_plain(*TINY), 5)
    network_module._constants.cache_clear()
    images, _ = batch()
    first, second = network.normalise(images), network.normalise(images)
    assert network_module._constants.cache_info().misses == 1 and torch.equal(first, second)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (network.backbone.mean, network.backbone.std))
    assert torch.equal(first, (images.float() / 255 - mean) / std)


@pytest.mark.parametrize(
    ("asked", "device", "cores", "processes", "expected"),
    [
        (3, "cuda", 16, 1, 3),
        (0, "cuda", 16, 1, 0),
        (None, "cpu", 16, 1, 0),
        (None, "cuda", 16, 1, 8),
        (None, "cuda", 16, 4, 3),
        (None, "cuda", 2, 8, 1),
    ],
)
def test_data_workers_by_default(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, device: str, cores: int, processes: int, expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    assert worker_count(asked, torch.device(device), processes) == expected


def test_float16_scales_the_loss_and_goes_on_after_an_overflow(tmp_path: Path) -> None:
    config = compose_plain(*TINY, *SHORT, "trainer.precision=float16", f"paths.outputs={tmp_path}")
    record = execute(config)
    assert record["steps"] == 3 and record["skipped_steps"] == 0
    state = torch.load(max(run_directory(config, None).glob("checkpoints/step-*.pt")), weights_only=True)
    assert state["scaler"]["scale"] > 0

    trained = stepper("trainer.precision=float16")
    trained.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = [p.clone() for p in trained.network.model.parameters()]
    assert trained.take(*batch()).problem is None and trained.overflows == 1
    assert all(torch.equal(p, old) for p, old in zip(trained.network.model.parameters(), before, strict=True))
    assert trained.scaler.get_scale() == 2.0**119, "the scaler has left the step out"


def test_gradients_that_overflow_without_end_are_a_problem() -> None:
    trained = stepper("trainer.precision=float16")
    trained.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=0.999)
    outcomes = [trained.take(*batch()) for _ in range(MOST_OVERFLOWS + 1)]
    assert all(outcome.problem is None for outcome in outcomes[:-1])
    assert "overflowed float16 in 21 steps in a row; try trainer.precision=bfloat16" in outcomes[-1].problem


def test_channels_last_changes_the_layout_and_nothing_else() -> None:
    seen = []
    usual, last = (stepper(f"trainer.channels_last={value}") for value in (False, True))
    last.network.model.load_state_dict(usual.network.model.state_dict())
    last.network.model.conv_stem.register_forward_pre_hook(lambda module, inputs: seen.append((module, *inputs)))
    images, labels = batch()
    losses = [trained.take(images, labels).loss for trained in (usual, last)]
    module, x = seen[0]
    for tensor in (x, module.weight):
        assert tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_measured_step_is_the_one_that_trains(precision: str) -> None:
    config = compose_plain(*TINY, "trainer.channels_last=true", f"trainer.precision={precision}")
    step = build_step(config, 5, 4, 32)
    inputs = []
    step.model.conv_stem.register_forward_hook(lambda module, x, out: inputs.append((x[0], out.dtype)))
    step.forward().backward()
    (x, dtype) = inputs[0]
    assert x.is_contiguous(memory_format=torch.channels_last) and dtype == getattr(torch, precision)


def test_what_changes_nothing_does_not_move_a_run() -> None:
    plain = compose_plain(*TINY)
    newer = "compile", "channels_last", "cuda_graph"
    older = {**plain, "trainer": {k: v for k, v in plain["trainer"].items() if k not in newer}}
    assert config_hash(plain) == config_hash(older)
    for key in newer:
        assert config_hash(compose_plain(*TINY, f"trainer.{key}=true")) != config_hash(plain)


def test_compile_trains_the_compiled_network_and_scores_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def compiled(model: torch.nn.Module):
        return lambda x: calls.append(model.training) or model(x)

    monkeypatch.setattr(torch, "compile", compiled)
    trained = stepper("trainer.compile=true")
    assert trained.take(*batch()).problem is None
    evaluate(trained.network, [batch()], torch.device("cpu"), "float32")
    assert calls == [True]


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_a_plain_one() -> None:
    plain, compiled = stepper("method.bn_stats=frozen"), stepper("method.bn_stats=frozen", "trainer.compile=true")
    compiled.network.model.load_state_dict(plain.network.model.state_dict())
    images, labels = batch()
    for _ in range(3):
        expected, found = (trained.take(images, labels).loss for trained in (plain, compiled))
        assert found == pytest.approx(expected, rel=1e-4)
