"""The batch benchmark's arithmetic: slopes, ratios, the search for the largest batch."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pandas
import pytest

from razorlab.bench.rows import Row

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def batches() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))  # a fresh process gets it, too
    try:
        spec = importlib.util.spec_from_file_location("batches", BENCHMARKS / "batches.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


def points(slopes: dict[str, float], start: float = 3.0) -> pandas.DataFrame:
    """Lines through (0, start) of these slopes; the predicted ones a tenth steeper."""
    return pandas.DataFrame(
        {
            "backbone": "mobilenetv2",
            "row": row,
            "batch": batch,
            **{f"{q}_MB": slope * batch + start for q in ("saved", "peak")},
            **{f"predicted_{q}_MB": 1.1 * slope * batch for q in ("saved", "peak")},
        }
        for row, slope in slopes.items()
        for batch in (1, 2, 4, 8)
    )


def test_slopes_and_ratios(batches: ModuleType) -> None:
    table = batches.slopes(points({"dense": 80.0, "compact 0.9": 8.0})).set_index("row")
    assert table.loc["dense", "peak_MB_an_image"] == pytest.approx(80)
    assert table.loc["compact 0.9", "predicted_saved_MB_an_image"] == pytest.approx(8.8)
    assert table.loc["compact 0.9", "saved_ratio"] == pytest.approx(10)
    assert table.loc["compact 0.9", "peak_ratio_off"] == pytest.approx(0, abs=1e-6)
    assert table["peak_MB_off_the_line"].max() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("budget", [500e6, 5e9])
def test_the_largest_batch_is_bracketed(
    batches: ModuleType, budget: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peak(batch: int) -> float:
        return (8.0 * batch + 3 + 0.001 * batch**2) * 1e6  # not quite a line

    row, asked = Row("mobilenetv2", "compact 0.9", razor=("compact", 0.9)), []

    def measured(_row: Row, batch: int, _folder: Path) -> float:
        asked.append(batch)
        return peak(batch)

    monkeypatch.setattr(batches, "peak_of", measured)
    found = batches.largest_batch(row, int(budget), points({"compact 0.9": 8.0}), tmp_path)
    assert peak(found["largest_batch"]) <= budget < peak(found["too_large"])
    assert found["too_large"] - found["largest_batch"] <= max(batches.TOLERANCE * found["largest_batch"], 1)
    assert len(asked) < 10


def test_a_point_is_measured_once(batches: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "new" / "point.json"
    assert batches._kept(file, lambda: 5) == 5
    assert batches._kept(file, lambda: 6) == 5
    assert json.loads(file.read_text())["commit"]


@pytest.mark.slow
def test_a_step_is_counted_whole(batches: ModuleType, tmp_path: Path) -> None:
    cases = {case.label: replace(case, row=replace(case.row, image=32)) for case in batches.whole_rows("resnet18")}
    assert list(cases)[2:] == [f"compact {sparsity}, released" for sparsity in (0.9, 0.97, 0.99)]
    dense, compact = (batches.need_of(cases[name], 4, tmp_path) for name in ("dense", "compact 0.97, released"))
    trained = sum(p.nbytes for p in cases["dense"].build().model.parameters() if p.requires_grad)
    assert dense > 3 * trained > compact > 2 * trained, "weights, gradients and momentum; weights and momentum"
