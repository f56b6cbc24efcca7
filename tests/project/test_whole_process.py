"""The benchmark of the whole process: its figures, its table, its bars."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pandas
import pytest

from backrazor.memory.processes import in_fresh_process
from razorlab.bench.rows import Row

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def whole() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))  # a fresh process gets it, too
    try:
        spec = importlib.util.spec_from_file_location("whole_process", BENCHMARKS / "whole_process.py")
        module = sys.modules["whole_process"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_every_row_is_there_once(whole: ModuleType) -> None:
    labels = [case.label for case in whole.cases("vit_b16")]
    assert labels[0] == "dense" and "LoRA" in labels and len(set(labels)) == len(labels)
    assert "LoRA" not in [case.label for case in whole.cases("resnet50")]


@pytest.mark.slow
def test_a_row_is_measured_with_its_parts(whole: ModuleType) -> None:
    row = Row("resnet18", "compact", razor=("compact", 0.97), image=64, batch=2)
    cases = {
        "dense": whole.Case(replace(row, razor=None)),
        "ours": whole.Case(row, released=True, state8=True),
    }
    dense, ours = (in_fresh_process(whole.measure, case, stable_malloc=True) for case in cases.values())
    for found in (dense, ours):
        parts = (found[f"{name}_MB"] for name in ("weights", "gradients", "optimizer", "peak"))
        assert found["parts_MB"] == pytest.approx(sum(parts), abs=0.3)
        assert found["above_bare_MB"] == pytest.approx(found["above_loaded_MB"] + found["libraries_MB"], abs=0.3)
        assert found["above_loaded_MB"] > found["weights_MB"] + found["optimizer_MB"]
    assert dense["libraries_MB"] < 0.3 < ours["libraries_MB"] < 15, "no compiler is loaded"
    assert ours["gradients_MB"] == 0 and ours["optimizer_MB"] < 0.3 * dense["optimizer_MB"]


def results() -> pandas.DataFrame:
    common = {"backbone": "net", "batch": 8, "weights_MB": 10.0, "gradients_MB": 10.0, "optimizer_MB": 10.0}
    rows = {"dense": 400.0, "compile, budget 0.5": 300.0, "compile, budget 0.2": 200.0, "compact 0.97, released": 70.0}
    lines = [
        {
            **common,
            "row": row,
            "peak_MB": peak,
            "parts_MB": peak + 30,
            "above_bare_MB": peak,
            "above_loaded_MB": peak / 2,
        }
        for row, peak in rows.items()
    ]
    lines.insert(0, lines[0] | {"peak_MB": 900.0, "parts_MB": 930.0, "above_bare_MB": 900.0})
    return pandas.DataFrame(lines)


def test_the_newest_line_of_a_row_stands_beside_dense(whole: ModuleType) -> None:
    table = whole.table(results()).set_index("row")
    assert len(table) == 4 and table.loc["dense", "above_bare_MB"] == 400
    assert table.loc["compact 0.97, released", "dense / above_bare"] == pytest.approx(400 / 70, abs=0.01)
    assert table.loc["compact 0.97, released", "dense / parts"] == 4.3


def test_the_bars_are_those_of_the_best_compile(
    whole: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {}
    real = whole.memory_by_part

    def kept(bars: dict, path: Path, title: str) -> Path:
        drawn.update(bars)
        return real(bars, path, title)

    monkeypatch.setattr(whole, "memory_by_part", kept)
    (file,) = whole.figures(results(), tmp_path / "whole_process.csv")
    assert list(drawn) == ["dense", "compile, budget 0.2", "compact 0.97, released"]
    assert drawn["dense"] == {"weights_mb": 10, "gradients_mb": 10, "optimizer_mb": 10, "peak_mb": 400}
    assert file.name == "whole_process-net.png" and file.stat().st_size > 1000
