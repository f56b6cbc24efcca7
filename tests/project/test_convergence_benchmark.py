"""The convergence benchmark's arithmetic: the error is that of the gradients, and the runs differ by it alone."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import backrazor as br

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def convergence() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("convergence", BENCHMARKS / "convergence.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(64, 10))


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    return torch.cat([g.double().flatten() for g in grads])


def test_the_error_is_that_of_the_whole_gradient(convergence: ModuleType) -> None:
    x, y = next(convergence.digits(16, seed=0))
    assert x.shape == (16, 3, 64, 64) and y.shape == (16,)
    model, config = network(), br.RazorConfig.paper(0.9)
    dense = gradient(model, x, y)
    br.razor_(model, config)
    razored = gradient(model, x, y)
    br.unrazor_(model)
    relative, cosine, loss = convergence.error(model, x, y, config)
    assert relative == pytest.approx(((razored - dense).norm() / dense.norm()).item(), rel=1e-4)
    assert cosine == pytest.approx(F.cosine_similarity(dense, razored, dim=0).item(), rel=1e-5)
    assert loss == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-5)


def test_runs_begin_alike_and_a_dense_one_has_no_error(convergence: ModuleType) -> None:
    one, many = next(convergence.digits(16, seed=1)), next(convergence.digits(64, seed=1))
    courses = {}
    for name, config in itertools.islice(convergence.configurations().items(), 3):
        courses[name] = convergence.course(network(), config, convergence.digits(16, seed=0), one, many, 6, 3)
    assert [row["step"] for row in courses["dense"]] == [0, 3, 6]
    assert len({rows[0]["loss"] for rows in courses.values()}) == 1
    assert all(row["error"] == row["mean_error"] == 0 and row["cosine"] == 1 for row in courses["dense"])
    for name in ("zero 0.9", "mean 0.9"):
        assert all(0 < row["mean_error"] < 2 and row["cosine"] < 1 for row in courses[name])
        assert courses[name][-1]["loss"] != courses["dense"][-1]["loss"]
    assert courses["dense"][-1]["loss"] < courses["dense"][0]["loss"]
