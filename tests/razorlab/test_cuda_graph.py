"""``trainer.cuda_graph=true`` by the semantics of captures, which ``graph_recorder`` stands for on the CPU."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, compose_plain
from graph_recorder import graphs_on_the_cpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backrazor.nn.base import NET, DropIn
from razorlab.errors import UserError
from razorlab.settings import validate
from razorlab.training import graphs
from razorlab.training import step as step_module
from razorlab.training.distributed import World
from razorlab.training.graphs import WARM_UP, check_graph
from razorlab.training.network import assemble
from razorlab.training.optimisation import Schedule, make_optimizer
from razorlab.training.run import execute
from razorlab.training.step import Stepper

STEPS = 9
COMPACT = ("razor=compact", "razor.sparsity=0.5")


class Run:
    """A stepper and its schedule, fed with batches."""

    def __init__(self, graph: bool, *overrides: str, state: dict | None = None) -> None:
        config = compose_plain(*TINY, "optim.warmup_steps=4", *overrides, f"trainer.cuda_graph={graph}")
        torch.manual_seed(0)
        network = assemble(config, 5)
        self.model, self.optim = network.model, config["optim"]
        self.optimizer = make_optimizer(network.model, network.backbone.head, config["optim"], fused=True)
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.stepper = Stepper(network, self.optimizer, config, 8, World())
        if state is not None:
            self.stepper.scaler.load_state_dict(state["scaler"])
        self.schedule = Schedule(self.optimizer, config["optim"], STEPS)

    def take(self, step: int, images: int = 8):
        self.schedule.set(step)
        for group in self.optimizer.param_groups:  # what a tensor holds of it
            group["lr"] = float(np.float32(group["lr"]))
        draw = torch.Generator().manual_seed(step)
        torch.manual_seed(100 + step)  # of dropout
        x = torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8, generator=draw)
        return self.stepper.take(x, torch.randint(5, (images,), generator=draw))

    def state(self) -> dict:
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.stepper.scaler}
        return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})


def assert_same_state(found: Run, wanted: Run) -> None:
    for (name, a), (_, b) in zip(found.model.state_dict().items(), wanted.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    states = (run.stepper.scaler.state_dict() for run in (found, wanted))
    assert next(states) == next(states)


SETTINGS = {
    "sgd, clipped, dropout": ("optim=sgd", "optim.lr=0.05", "optim.grad_clip=0.5", "model.drop_rate=0.3"),
    "adam, razored, micro-batches": (*COMPACT, "trainer.micro_batch=3", "method.bn_stats=frozen"),
    "adamw, float16": ("optim=adamw", "trainer.precision=float16", "optim.head_lr_multiplier=10"),
    "razored, bfloat16, skipping": (*COMPACT, "trainer.precision=bfloat16", "trainer.nonfinite=skip"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_replayed_steps_are_the_plain_ones(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning rates change at every step, one batch has another size, dropout draws anew."""
    plain = Run(False, *SETTINGS[setting])
    with graphs_on_the_cpu(monkeypatch) as (made, _):
        graphed = Run(True, *SETTINGS[setting])
        for step in range(STEPS):
            images = 5 if step == 6 else 8  # the last batch of a split
            found, wanted = (run.take(step, images) for run in (graphed, plain))
            assert found.problem is None and found.correct == wanted.correct
            assert found.loss == wanted.loss, step
    assert len(made) == 2 and [graph.replays for graph in made] == [STEPS - WARM_UP - 1] * 2
    assert_same_state(graphed, plain)
    rates = [group["lr"] for group in graphed.optimizer.param_groups]
    assert rates == [group["lr"] for group in plain.optimizer.param_groups]
    assert all(type(rate) is float for rate in rates)


def test_a_run_goes_on_from_what_a_graph_has_done(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = ("optim=adam", "trainer.precision=float16")
    plain = Run(False, *setting)
    with graphs_on_the_cpu(monkeypatch):
        graphed = Run(True, *setting)
        for step in range(STEPS):
            if step == 5:
                graphed = Run(True, *setting, state=graphed.state())
            for run in (graphed, plain):
                run.take(step)
    assert_same_state(graphed, plain)


def test_an_overflow_leaves_the_step_out_and_lowers_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    with graphs_on_the_cpu(monkeypatch) as (made, _):
        graphed = Run(True, "optim=adam", "trainer.precision=float16")
        for step in range(WARM_UP + 1):
            assert graphed.take(step).problem is None
        scaler, before = graphed.stepper.scaler, graphed.state()["model"]
        scaler._scale.fill_(2.0**126)
        assert graphed.take(5).problem is None and graphed.stepper.overflows == 1
        assert scaler.get_scale() == 2.0**125
        parameters = dict(graphed.model.named_parameters())
        assert all(torch.equal(parameters[name], before[name]) for name in parameters)
        scaler._scale.fill_(1024.0)
        assert graphed.take(6).problem is None and graphed.stepper.overflows == 0
        assert [graph.replays for graph in made] == [3, 2]


def test_the_first_overflows_of_float16_are_no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer's state is made by its first step: captured, each replay would make it anew."""
    with graphs_on_the_cpu(monkeypatch) as (made, _):
        graphed = Run(True, "optim=adam", "trainer.precision=float16")
        graphed.stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-63)
        for step in range(WARM_UP + 1):
            graphed.take(step)
            assert not made


@pytest.mark.parametrize("way", ["stop", "skip"])
def test_a_bad_number_in_a_replay_is_named_and_reaches_no_weight(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with graphs_on_the_cpu(monkeypatch) as (made, _):
        graphed = Run(True, *COMPACT, f"trainer.nonfinite={way}", "method.bn_stats=batch")
        for step in range(WARM_UP + 2):
            assert graphed.take(step).problem is None
        weight = graphed.model.conv_stem.weight
        kept, before = weight[0, 0, 0, 0].item(), graphed.state()["model"]
        with torch.no_grad():
            weight[0, 0, 0, 0] = float("inf")
        assert "first in the output of conv_stem, whose weight is not finite" in graphed.take(5).problem
        with torch.no_grad():
            weight[0, 0, 0, 0] = kept
        after = graphed.state()["model"]
        for name in after if way == "skip" else dict(graphed.model.named_parameters()):
            assert torch.equal(after[name], before[name]), name
        replays = made[1].replays
        outcome = graphed.take(6)
        if way == "skip":
            assert outcome.problem is None and made[1].replays == replays + 1


def test_captures_share_a_pool_and_the_stream_of_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with graphs_on_the_cpu(monkeypatch) as (_, calls):
        graphed = Run(True, "optim=sgd")
        for step in range(WARM_UP + 1):
            graphed.take(step)
    side = graphed.stepper.halves.side
    assert [call for call in calls if call[0] == "captures"] == [("captures", "the pool", side, "thread_local")] * 2
    here = next(call[2] for call in calls if call[:2] == ("waits", side))
    aside = [("waits", side, here), ("runs on", side), ("waits", here, side)]
    assert [call for call in calls if call[0] != "captures"] == aside * (2 * WARM_UP)


class Reading:
    """A step that reads its device."""

    def gradients(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return images.float().sum() if images.float().sum() > 0 else images

    def update(self) -> None:
        pass


def test_a_step_that_reads_its_device_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with graphs_on_the_cpu(monkeypatch):
        step = graphs.GraphedStep(Reading(), torch.optim.SGD([torch.zeros(1)], lr=1.0))
        for _ in range(WARM_UP):
            step.gradients(torch.ones(2), torch.ones(2))
            step.update()
        with pytest.raises(UserError, match=r"cannot be captured .operation not permitted.*leave trainer.cuda_graph"):
            step.gradients(torch.ones(2), torch.ones(2))


def test_memory_that_a_graph_works_on_has_to_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the recorder is for: a constant that somebody drops after the capture is noticed."""
    with graphs_on_the_cpu(monkeypatch):
        graph, x, constant, out = torch.cuda.CUDAGraph(), torch.ones(2), torch.full((2,), 3.0), torch.zeros(2)
        with torch.cuda.graph(graph, pool=0, stream=None, capture_error_mode=""):
            out.add_(x * constant)
        assert out.tolist() == [0, 0], "a capture changes nothing"
        x.fill_(2)
        graph.replay()
        assert out.tolist() == [6, 6]
        del constant
        with pytest.raises(AssertionError, match="freed after the capture"):
            graph.replay()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("trainer.device=cpu",), "trainer.device=cpu contradict each other: only a CUDA device has graphs"),
        (("trainer.compile=true",), "trainer.compile=true contradict each other: choose one"),
        (("trainer.checkpointing=block",), "trainer.checkpointing=block contradict each other: recomputation"),
        (
            ("razor=none", "trainer.checkpointing=selective"),
            "trainer.checkpointing=selective contradict each other: recomputation",
        ),
    ],
)
def test_settings_that_exclude_graphs(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate(compose_plain("trainer.cuda_graph=true", *overrides))


def test_devices_and_kernels_that_exclude_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_plain(*TINY, *COMPACT, "trainer.cuda_graph=true")
    monkeypatch.setattr(graphs.torch, "empty", lambda *_, **__: None)
    for fast, device, processes, words in (
        (True, "cpu", 1, "no CUDA device"),
        (True, "cuda", 2, "2 processes share each batch"),
        (None, "cuda", 1, "kernels in plain PyTorch"),
    ):
        monkeypatch.setattr(graphs, "implementation", lambda family, tensor, fast=fast: fast)
        with pytest.raises(UserError, match=f"trainer.cuda_graph=true is not possible: .*{words}.*; leave it out"):
            check_graph(config, torch.device(device), processes)
    monkeypatch.setattr(graphs, "implementation", lambda family, tensor: True)
    check_graph(config, torch.device("cuda"), 1)
    check_graph({**config, "trainer": {**config["trainer"], "cuda_graph": False}}, torch.device("cpu"), 2)


class OneDevice(TorchDispatchMode):
    """Notes operators that touch more than one device: copies that wait, and numbers that the host would read."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.mixed = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        devices = {str(leaf.device) for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)}
        self.count += 1
        if len(devices) > 1:
            self.mixed.append(str(function))
        return result


@pytest.mark.parametrize(
    ("model", "size"), [("test_efficientnet", 32), ("test_vit", 160), ("mobilenetv3_small_050", 32)], ids=str
)
def test_the_captured_work_stays_on_its_device(model: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device whose tensors have no data, so that a read has nothing to give. The second step is looked at."""
    monkeypatch.setattr(step_module, "autocast", lambda *_: nullcontext())  # it knows no such device
    config = compose_plain(*TINY, *COMPACT, "optim.grad_clip=1", f"model.name={model}", f"data.image_size={size}")
    network, device = assemble(config, 5), torch.device("meta")
    to_device(network.model, device)
    optimizer = make_optimizer(network.model, network.backbone.head, config["optim"])
    stepper = Stepper(network, optimizer, config, 8, World())
    images = torch.empty(8, 3, size, size, dtype=torch.uint8, device=device)
    labels = torch.empty(8, dtype=torch.int64, device=device)
    for _ in range(2):
        with OneDevice() as seen:
            figures = stepper.gradients(images, labels)
            stepper.update()
    assert figures.device == device and figures.shape == (4,)
    assert seen.count > 500 and not seen.mixed


def to_device(model: torch.nn.Module, device: torch.device) -> None:
    """Put a model's tensors on ``device``, without data."""
    for module in model.modules():
        for owned in (module._parameters, module._buffers):
            for name, tensor in owned.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    trained = owned is module._parameters
                    owned[name] = torch.nn.Parameter(fake, tensor.requires_grad) if trained else fake
        statuses = [module._backrazor_status] if isinstance(module, DropIn) else []
        for status in (*statuses, *(place.status for place in [module.__dict__.get(NET)] if place is not None)):
            status._flags = {device: torch.zeros(1, dtype=torch.int32, device=device)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_on_a_gpu_a_captured_run_has_the_losses_of_a_plain_one(precision: str, tmp_path: Path) -> None:
    common = (*TINY, *COMPACT, f"trainer.precision={precision}", "optim=sgd", "trainer.device=cuda", "trainer.epochs=2")
    records = [
        execute(compose_plain(*common, f"trainer.cuda_graph={graph}", f"paths.outputs={tmp_path}"))
        for graph in (False, True)
    ]
    assert records[0]["steps"] == records[1]["steps"] > WARM_UP + 1
    assert records[1]["val"]["loss"] == pytest.approx(records[0]["val"]["loss"], rel=5e-2)
