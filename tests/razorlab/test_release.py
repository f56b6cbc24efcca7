"""trainer.release_gradients and optim.state_bits: the run of the ordinary step, and one line where there is none."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, compose_plain
from torch.utils._pytree import tree_leaves

from razorlab.commands import train
from razorlab.errors import UserError
from razorlab.records import config_hash, read_record, run_directory
from razorlab.tables.collect import row_label
from razorlab.training import step
from razorlab.training.network import Network
from razorlab.training.releasing import check_release
from razorlab.training.run import execute

RUN = ("trainer.epochs=2", "trainer.batch_size=30", "data.train_fraction=0.06", "optim.lr=0.01")
RUN += ("trainer.eval_every=2",)
RELEASED = "trainer.release_gradients=true"


def final_state(*overrides: str) -> dict:
    """The last checkpoint of a run."""
    config = compose_plain(*TINY, *RUN, *overrides)
    execute(config)
    return torch.load(max(run_directory(config, None).glob("checkpoints/step-*.pt")), weights_only=True)


@pytest.mark.parametrize(
    "overrides",
    [
        ("optim=sgd",),
        ("optim=adam", "optim.weight_decay=0.01"),
        ("optim=adamw", "razor=compact", "razor.sparsity=0.9"),
        ("optim=sgd", "razor=paper", "razor.sparsity=0.8", "trainer.checkpointing=stage"),
        ("optim=adam", "razor=int8", "trainer.precision=bfloat16", "trainer.channels_last=true"),
        ("optim=sgd", "optim.grad_clip_each=0.05", "razor=compact", "razor.sparsity=0.9"),
        ("optim=sgd", "optim.state_bits=8", "razor=compact", "razor.sparsity=0.9"),
        ("optim=adam", "optim.state_bits=8"),
        ("optim=adamw", "optim.state_bits=8", "trainer.checkpointing=block"),
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_a_run_ends_with_the_ordinary_step_s_weights_to_the_bit(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    ordinary, released = (final_state(*overrides, *way, f"paths.outputs={tmp_path}") for way in ((), (RELEASED,)))
    assert ordinary["step"] == released["step"] == 6
    assert all(torch.equal(value, released["model"][name]) for name, value in ordinary["model"].items())
    states = ordinary["optimizer"]["state"], released["optimizer"]["state"]
    assert states[0] and states[0].keys() == states[1].keys()
    for number in states[0]:
        for one, other in zip(*(tree_leaves(state[number]) for state in states), strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_clipping_each_parameter_changes_the_run(tmp_path: Path) -> None:
    plain, clipped = (
        final_state("optim=sgd", *limit, f"paths.outputs={tmp_path}") for limit in ((), ("optim.grad_clip_each=0.05",))
    )
    assert not all(torch.equal(value, clipped["model"][name]) for name, value in plain["model"].items())


def test_an_interrupted_run_with_released_gradients_and_8_bits_goes_on(tmp_path: Path, monkeypatch) -> None:
    both = ("optim=adamw", "optim.state_bits=8", RELEASED, "razor=compact", "razor.sparsity=0.9")
    whole = final_state(*both, f"paths.outputs={tmp_path / 'whole'}")
    take = step.Stepper.take
    calls = []

    def interrupted(
        self: step.Stepper, images: torch.Tensor, labels: torch.Tensor, stop: int, batch: int
    ) -> step.Outcome:
        calls.append(stop)
        return take(self, images, labels, step.STOPS[-1] if len(calls) == 4 else stop, batch)

    monkeypatch.setattr(step.Stepper, "take", interrupted)
    with pytest.raises(train.Interrupted):
        final_state(*both, f"paths.outputs={tmp_path / 'cut'}")
    assert len(calls) == 4
    cut = final_state(*both, f"paths.outputs={tmp_path / 'cut'}")
    assert len(calls) == 6
    assert all(torch.equal(value, cut["model"][name]) for name, value in whole["model"].items())


def spoil(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """The third step's gradient, or the third forward, is bad."""
    plain, calls = step.Stepper.__init__, []

    def third(value: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return value * math.inf if len(calls) == 3 else value

    def spoilt(self: step.Stepper, network: Network, *rest: object) -> None:
        if where == "gradient":
            network.model.get_parameter("conv_head.weight").register_hook(third)
        else:
            layer = network.model.get_submodule("blocks.1.0")
            layer.register_forward_hook(lambda module, _, out: third(out) if module.training else out)
        plain(self, network, *rest)

    monkeypatch.setattr(step.Stepper, "__init__", spoilt)


@pytest.mark.parametrize("where", ["gradient", "activation"])
def test_a_bad_step_ends_the_run_and_its_last_checkpoint_is_good(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    spoil(monkeypatch, where)
    code, lines = command(*TINY, *RUN, "optim=sgd", RELEASED, "trainer.save_every=1")
    assert code == train.NOT_FINITE
    said = "the gradient of conv_head.weight is not finite" if where == "gradient" else "the loss is nan"
    assert lines[-1].startswith(f"train.py: step 3: {said}") and "step-00000002.pt" in lines[-1]
    weights = torch.load(next(tmp_path.rglob("step-00000002.pt")), weights_only=True)["model"]
    assert all(value.isfinite().all() for value in weights.values())
    assert not list(tmp_path.rglob("step-00000003.pt"))


def test_a_bad_loss_changes_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found before backward; a step that is left as it was can be looked into."""
    spoil(monkeypatch, "activation")
    seen = []
    explain = step.Stepper._explain

    def look(self: step.Stepper, loss: float, images: torch.Tensor) -> str | None:
        seen.append([p.detach().clone() for p in self.network.model.parameters()])
        return explain(self, loss, images)

    monkeypatch.setattr(step.Stepper, "_explain", look)
    with pytest.raises(FloatingPointError):
        final_state("optim=sgd", RELEASED, "trainer.save_every=1", f"paths.outputs={tmp_path}")
    after_two = torch.load(next(tmp_path.rglob("step-00000002.pt")), weights_only=True)["model"]
    names = [name for name in after_two if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert len(names) == len(seen[0])
    assert all(torch.equal(after_two[name], value) for name, value in zip(names, seen[0], strict=True))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((RELEASED, "optim.grad_clip=1"), "optim.grad_clip=1 contradict each other: the norm of all gradients"),
        ((RELEASED, "trainer.micro_batch=8"), "trainer.micro_batch=8 contradict each other: gradients add up"),
        ((RELEASED, "trainer.nonfinite=skip"), "trainer.nonfinite=skip contradict each other: others have stepped"),
        ((RELEASED, "trainer.precision=float16"), "trainer.precision=float16 contradict each other: an overflow"),
        ((RELEASED, "trainer.compile=true"), "trainer.compile=true contradict each other: a compiled backward"),
        ((RELEASED, "trainer.cuda_graph=true"), "trainer.cuda_graph=true contradict each other: a graph's gradients"),
        (("optim=sgd", "optim.momentum=0", "optim.state_bits=8"), "sgd without momentum has no state"),
        (("optim=adam", "optim.weight_decay=0.1", "optim.state_bits=8"), "choose optim=adamw"),
        (("optim.state_bits=8", "trainer.cuda_graph=true"), "optim.state_bits=8 trainer.cuda_graph=true contradict"),
        (("optim.state_bits=4",), "optim.state_bits=4 is not allowed"),
        (("optim.grad_clip_each=0",), "optim.grad_clip_each=0"),
    ],
)
def test_what_cannot_be_is_one_line_with_its_reason(command, overrides: tuple[str, ...], words: str) -> None:
    code, lines = command(*TINY, *overrides)
    assert code == 2 and len(lines) == 1 and words in lines[0]


def test_several_processes_are_refused() -> None:
    config = compose_plain(*TINY, RELEASED)
    check_release(config, 1)
    with pytest.raises(UserError, match="2 processes share each batch"):
        check_release(config, 2)


def test_without_the_library_8_bits_are_one_line(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    code, lines = command(*TINY, *RUN, "optim=sgd", "optim.state_bits=8")
    assert code == 2 and len(lines) == 1
    assert "optim.state_bits=8 needs bitsandbytes" in lines[0] and "pip install 'backrazor[state8]'" in lines[0]


EIGHT = """
import os, sys
import torch
from razorlab.training.optimisation import make_optimizer
{before}
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 9))
optim = {{"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "head_lr_multiplier": 1, "state_bits": 8}}
optimizer = make_optimizer(model, "1", optim)
for _ in range(3):
    model(torch.randn(4, 128)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
print("torch._inductor.compile_fx" in sys.modules, model[0].weight.double().sum().item())
print(os.environ.get("TORCHDYNAMO_DISABLE"))
calls = []
compiled = torch.compile(torch.sin, backend=lambda graph, inputs: calls.append(graph) or graph.forward)
assert torch.equal(compiled(torch.ones(2)), torch.ones(2).sin()) and len(calls) == 1
"""


@pytest.mark.slow
def test_8_bits_load_no_compiler_and_leave_it_to_others() -> None:
    """Beside bitsandbytes as it imports itself: the same numbers, and what is compiled later is compiled."""
    found = []
    for before in ("", "import bitsandbytes"):
        done = subprocess.run(
            [sys.executable, "-c", EIGHT.format(before=before)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    (loaded, ours, variable), (plain_loaded, plain, plain_variable) = found
    assert (loaded, plain_loaded) == ("False", "True")
    assert ours == plain and variable == plain_variable == "None"


@pytest.mark.slow
def test_the_record_has_the_four_parts_measured_and_a_label_of_its_own(tmp_path: Path) -> None:
    small = ("trainer.epochs=1", "trainer.measure.mode=all", "trainer.measure.repeats=1", "trainer.measure.steps=1")
    memories = []
    for way in ((), (RELEASED, "optim.state_bits=8")):
        config = compose_plain(*TINY, *RUN, *small, *way, f"paths.outputs={tmp_path}")
        execute(config)
        memories.append(read_record(run_directory(config, None) / "record.json")["memory"])
    ordinary, released = memories
    for memory in memories:
        parts = ("weight_bytes", "gradient_bytes", "optimizer_bytes", "peak_bytes")
        assert memory["total_bytes"] == sum(memory[name] for name in parts) and memory["above_bare_bytes"] > 0
    assert released["gradient_bytes"] == 0 < ordinary["gradient_bytes"]
    assert ordinary["optimizer_bytes"] > 2 * ordinary["gradient_bytes"]
    assert released["optimizer_bytes"] < 0.5 * ordinary["optimizer_bytes"]
    assert row_label(config).endswith("dense + released + 8-bit state")


def test_the_new_keys_leave_the_folders_of_earlier_runs_where_they_are() -> None:
    config = compose_plain(*TINY)
    earlier = {section: dict(keys) if isinstance(keys, dict) else keys for section, keys in config.items()}
    del earlier["trainer"]["release_gradients"], earlier["optim"]["state_bits"], earlier["optim"]["grad_clip_each"]
    assert config_hash(config) == config_hash(earlier)
    for other in (RELEASED, "optim.state_bits=8", "optim.grad_clip_each=1"):
        assert config_hash(compose_plain(*TINY, other)) != config_hash(config)
