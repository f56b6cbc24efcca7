"""The zoo's tables: what is measured of a network, dense, razored and compiled, and how it is kept and told."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import backrazor as br
from razorlab.commands import zoo
from razorlab.zoo.cases import Case
from razorlab.zoo.compiling import CompiledRow, compared, measure_compiled
from razorlab.zoo.measuring import measure
from razorlab.zoo.table import compiled_summary, read, write

CONFIG = br.RazorConfig(0.9)


class Breaking(nn.Linear):
    """A graph ends in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


def case(middle: Callable[[int, int], nn.Module] = nn.Linear) -> Case:
    def make() -> tuple[nn.Module, Callable]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), middle(512, 64))
        x = torch.randn(64, 256)
        return model, lambda called: [called(x)]

    return Case("tests/mlp", "an MLP", make)


def test_a_row_of_a_network() -> None:
    row = measure(case(), CONFIG)
    assert row.error == "" and row.forward == "bits"
    assert row.dense_mb / row.saved_mb > 4
    assert 0.7 < row.cosine < 1 and row.replaced == 3  # pruned at random


@pytest.mark.slow
def test_a_compiled_row_is_one_graph_of_the_same_gradients_and_bytes() -> None:
    row = measure_compiled(case(), CONFIG, limit=120)
    assert row.error == row.dense_error == ""
    assert (row.dense_graphs, row.graphs, row.breaks, row.again) == (1, 1, 0, 0)
    assert row.forward == "bits" and row.difference < 1e-6 and row.cosine == pytest.approx(1)
    assert row.compiled_mb == pytest.approx(row.eager_mb, rel=0.02)
    assert row.eager_mb < row.dense_eager_mb / 4


@pytest.mark.slow
def test_breaks_and_failures_are_told_apart() -> None:
    broken = measure_compiled(case(Breaking), CONFIG, limit=120)
    assert broken.dense_breaks == broken.breaks > 0 and broken.error == broken.reasons == ""
    assert broken.graphs >= broken.dense_graphs > 0

    def failing() -> None:
        raise ValueError("not here")

    assert measure_compiled(Case("tests/failing", "", failing), CONFIG, limit=120).error == "ValueError: not here"


def test_a_process_that_dies_or_does_not_end_leaves_a_row() -> None:
    def dying() -> None:
        os._exit(7)

    def endless() -> None:
        time.sleep(60)

    died = measure_compiled(Case("tests/dying", "", dying), CONFIG, limit=60)
    assert died.error == "the process died with code 7"
    late = measure_compiled(Case("tests/endless", "", endless), CONFIG, limit=0.5)
    assert late.error.startswith("no end after")


def test_gradients_of_other_parameters_are_an_error() -> None:
    one, other = {"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(ValueError, match="1 gradients exist only"):
        compared(one, other)
    assert compared(one, {"a": torch.tensor([1.0, -1.0])}) == pytest.approx((0, 2**0.5))


def test_the_summary_names_what_is_not_as_it_should_be(tmp_path: Path) -> None:
    good = CompiledRow("tests/good", "", 1, 0, 0, 0.0, 10.0, 10.0, 1, 0, 0, "bits", 1.0, 1e-7, 1.0, 1.0)
    rows = {
        row.name: row
        for row in (
            good,
            replace(good, name="tests/breaking", graphs=3, breaks=2),
            replace(good, name="tests/other", difference=0.1),
            replace(good, name="tests/large", compiled_mb=1.5),
            replace(good, name="tests/dense", compiled_mb=1.5, dense_mb=10.5),  # the network's own bytes
            replace(good, name="tests/failed", error="ValueError: no"),
        )
    }
    write(tmp_path / "rows.csv", rows, CompiledRow)
    assert read(tmp_path / "rows.csv", CompiledRow) == rows
    told = compiled_summary(rows)
    assert "4 of 5 that are one graph dense are one graph razored" in told
    assert "4 of 5: gradients equal" in told and "4 of 5: saved bytes" in told
    for name, count in {"breaking": 1, "other": 1, "large": 1, "failed": 1, "dense": 0, "good": 0}.items():
        assert told.count(f"tests/{name}") == count, name


def test_a_run_that_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "cases", lambda patterns: iter([case(), replace(case(), name="tests/second")]))
    out = tmp_path / "rows.csv"
    assert zoo.main(["--out", str(out), "--only", "tests/*"]) == 0
    first = out.read_text()
    assert first.count("tests/") == 2
    monkeypatch.setattr(zoo, "measure", lambda *_: pytest.fail("measured twice"))
    assert zoo.main(["--out", str(out)]) == 0
    assert out.read_text() == first
