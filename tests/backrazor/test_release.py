"""Gradients that are freed during backward: the ordinary step's weights, to the bit, and what cannot be had."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import backrazor as br
from backrazor.memory import GradientRelease, measure_step, predict, state_bytes

OPTIMIZERS: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
    "sgd, foreach": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, foreach=True),
    "adam": lambda groups: torch.optim.Adam(groups, weight_decay=0.01),
    "adamw": lambda groups: torch.optim.AdamW(groups, weight_decay=0.05, amsgrad=True),
    "adamw, fused": lambda groups: torch.optim.AdamW(groups, weight_decay=0.05, fused=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, momentum=0.9),
    "adafactor": torch.optim.Adafactor,
    "sgd, 8 bits": lambda groups: bitsandbytes.optim.SGD8bit(groups, 0.05, momentum=0.9),
    "adamw, 8 bits": bitsandbytes.optim.AdamW8bit,
}


class Tied(nn.Module):
    """A convolution, a norm, and a weight that is used twice, so that its gradient is whole after two nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.mix = nn.Linear(256, 256)  # large enough for a state at 8 bits
        self.head = nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.first(x), 4).flatten(1)
        return self.head(self.mix(F.gelu(self.mix(x))))


class Steps:
    """Steps of the same seed, one way and the other."""

    def __init__(self, kind: str, sparsity: float | None, released: bool) -> None:
        torch.manual_seed(0)
        self.model = Tied()
        if sparsity is not None:
            br.razor_(self.model, br.RazorConfig(sparsity))
        parameters = list(self.model.parameters())
        self.optimizer = OPTIMIZERS[kind]([{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.01}])
        self.release = GradientRelease(self.optimizer) if released else None
        self.draw = torch.Generator().manual_seed(1)

    def take(self, steps: int) -> None:
        for number in range(steps):
            self.optimizer.param_groups[0]["lr"] = 0.02 / (1 + number)  # as a schedule does
            x, y = torch.randn(6, 3, 8, 8, generator=self.draw), torch.randint(5, (6,), generator=self.draw)
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("sparsity", [None, 0.9])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_weights_are_those_of_the_ordinary_step_to_the_bit(kind: str, sparsity: float | None) -> None:
    ordinary, released = (Steps(kind, sparsity, way) for way in (False, True))
    start = released.weights()
    for steps in (ordinary, released):
        steps.take(30)
    assert same(ordinary.weights(), released.weights()) and not same(start, released.weights())
    assert all(parameter.grad is None for parameter in released.model.parameters())
    assert state_bytes(ordinary.optimizer) == state_bytes(released.optimizer) > 0


def test_a_checkpoint_of_one_way_goes_on_the_other_way() -> None:
    whole, first, second = (Steps("adam", 0.9, way) for way in (False, True, False))
    whole.take(8)
    first.take(4)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.draw = first.draw
    second.take(4)
    other = Steps("adam", 0.9, False)
    other.take(4)
    other.take(4)
    assert same(second.weights(), other.weights())
    first.release.remove()
    assert not same(whole.weights(), second.weights()), "the schedule starts anew in the second half"


def test_one_gradient_lies_there_at_a_time() -> None:
    steps = Steps("sgd", None, False)
    living: list[int] = []

    def count(_parameter: Tensor) -> None:
        living.append(sum(p.grad is not None for p in steps.model.parameters()))

    release = GradientRelease(steps.optimizer, count)
    steps.take(1)
    assert living == [1] * len(list(steps.model.parameters()))
    release.remove()
    steps.take(1)
    assert len(living) == len(list(steps.model.parameters())), "removed hooks run no more"
    assert all(p.grad is not None for p in steps.model.parameters())


def test_what_looks_before_may_leave_a_parameter_as_it_is() -> None:
    steps = Steps("sgd", None, False)

    def leave_out(parameter: Tensor) -> None:
        if parameter is steps.model.head.weight:
            parameter.grad = None

    GradientRelease(steps.optimizer, leave_out)
    before = steps.weights()
    steps.take(1)
    changed = {name for name, value in steps.weights().items() if not torch.equal(value, before[name])}
    assert "head.weight" not in changed and "head.bias" in changed


class GroupMean(torch.optim.SGD):
    """Counts its steps once for a whole group."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


def test_an_optimizer_that_needs_all_gradients_is_refused() -> None:
    model = Tied()
    with pytest.raises(TypeError, match="LBFGS steps all parameters at once"):
        GradientRelease(torch.optim.LBFGS(model.parameters()))
    GradientRelease(GroupMean(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="GroupMean keeps 'k' for a whole group"):
        model(torch.randn(2, 3, 8, 8)).sum().backward()


@pytest.mark.parametrize("kind", ["sgd", "adamw", "sgd, 8 bits", "adamw, 8 bits"])
def test_the_parts_are_predicted_to_the_byte(kind: str) -> None:
    steps = Steps(kind, 0.9, False)
    one, other = (predict(steps.model, (3, 8, 8), 6, optimizer=steps.optimizer, release_gradients=r) for r in (0, 1))
    assert not steps.optimizer.state, "the optimizer is as it was"
    steps.take(1)
    assert one.optimizer_bytes == other.optimizer_bytes == state_bytes(steps.optimizer)
    assert one.gradient_bytes == sum(p.grad.nbytes for p in steps.model.parameters()) and other.gradient_bytes == 0
    assert one.weight_bytes == sum(t.nbytes for t in steps.model.state_dict().values())
    parts = one.weight_bytes, one.gradient_bytes, one.optimizer_bytes, one.peak_bytes
    assert one.total_bytes == sum(parts) > other.total_bytes


def test_releasing_needs_an_optimizer_to_predict() -> None:
    with pytest.raises(ValueError, match="needs the optimizer"):
        predict(Tied(), (3, 8, 8), 2, release_gradients=True)


def large_step(released: bool) -> br.memory.Step:
    """Weights of 48 MB, so that gradients of as many bytes stand out."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(2000, 2000, bias=False), nn.ReLU())))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if released:
        GradientRelease(optimizer)
    x = torch.randn(4, 2000)
    return br.memory.Step(model, lambda: model(x).square().mean(), optimizer)


def ordinary_step() -> br.memory.Step:
    return large_step(False)


def released_step() -> br.memory.Step:
    return large_step(True)


@pytest.mark.slow
def test_a_measured_step_says_its_four_parts_and_the_process_agrees() -> None:
    ordinary, released = (
        measure_step(step, repeats=1, steps=1, what=("peak",), threads=1) for step in (ordinary_step, released_step)
    )
    weights = 3 * 2000 * 2000 * 4
    assert (ordinary.weight_bytes, ordinary.gradient_bytes, ordinary.optimizer_bytes) == (weights,) * 3
    assert (released.weight_bytes, released.gradient_bytes, released.optimizer_bytes) == (weights, 0, weights)
    assert ordinary.total_bytes == 3 * weights + ordinary.peak_bytes
    saved = ordinary.above_bare_bytes - released.above_bare_bytes
    assert saved == pytest.approx(ordinary.total_bytes - released.total_bytes, abs=4e6)
    assert saved > 0.6 * weights, "two of three gradients never lie there"
