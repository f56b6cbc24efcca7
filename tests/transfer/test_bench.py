"""The step benchmark: rows, rounds that resume, the table and its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas
import pytest

import backrazor as br
from transfer.bench import measure
from transfer.bench.rows import MAIN, micro_batch, rows_of
from transfer.tables.figures import fastest_front


def test_rows_name_every_rival() -> None:
    labels = [row.label for row in rows_of("resnet18")]
    assert labels[0] == "dense" and set(MAIN) <= set(labels) and len(set(labels)) == len(labels)
    assert "save_on_cpu" not in labels


def test_the_micro_batch_peaks_no_higher_than_compact() -> None:
    size = micro_batch("vit_b16", "float32", 16)
    assert 1 <= size < 16 and 16 % size == 0


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[list, Path]:
    """Dense and compact of a small step, measured once."""
    folder = tmp_path_factory.mktemp("bench")
    rows = [replace(row, image=32, batch=2) for row in rows_of("resnet18") if row.label in ("dense", "compact 0.9")]
    measure.measure_backbone(rows, folder, repeats=1, steps=1)
    return rows, folder


def test_table_holds_ratios_to_dense(measured: tuple[list, Path]) -> None:
    rows, folder = measured
    dense, compact = measure.table_of(rows, folder)
    assert dense["saved_ratio"] == dense["peak_ratio"] == dense["time_ratio"] == 1
    assert compact["saved_ratio"] > 5 and compact["saved_MB"] < dense["saved_MB"]
    assert 0 < compact["codec_share"] < 1 and dense["codec_share"] is None
    assert compact["forward_s"] > 0 and compact["backward_s"] > 0


def test_what_is_measured_is_not_measured_again(measured: tuple[list, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("measured again")

    rows, folder = measured
    monkeypatch.setattr(br.memory, "measure_steps", never)
    monkeypatch.setattr(br.memory, "measure_step", never)
    measure.measure_backbone(rows, folder, repeats=1, steps=1)
    with pytest.raises(AssertionError, match="measured again"):
        measure.measure_backbone(rows, folder, repeats=2, steps=1)


def test_a_time_stands_beside_the_dense_steps_of_its_turns(measured: tuple[list, Path]) -> None:
    rows, folder = measured
    dense, compact = (json.loads(measure._file(folder, row, "time", 0).read_text()) for row in rows)
    assert compact["dense_times"] == dense["times"] != compact["times"]
    line = measure.summary(folder, rows[1], rows[0])
    assert line is not None
    assert line["time_ratio"] == pytest.approx(sum(compact["times"][0]) / sum(dense["times"][0]), abs=1e-3)


def test_a_network_of_the_benchmark_has_gradients() -> None:
    step = replace(rows_of("proxylessnas")[0], image=64, batch=2).build()
    step.forward().backward()
    assert all(p.grad.abs().max() > 1e-6 for p in step.model.parameters() if p.requires_grad)


def test_a_row_without_time_is_left_out(measured: tuple[list, Path]) -> None:
    rows, folder = measured
    assert measure.summary(folder, replace(rows[1], label="other"), rows[0]) is None


def test_newer_lines_replace_older_ones(measured: tuple[list, Path], tmp_path: Path) -> None:
    rows, folder = measured
    table, results = measure.table_of(rows, folder), tmp_path / "steps.csv"
    measure.write(table, results, "python scripts/benchmark.py")
    table[1]["peak_MB"] = 12345.0
    measure.write(table[1:], results, "python scripts/benchmark.py")
    frame = pandas.read_csv(results)
    assert list(frame["row"]) == ["dense", "compact 0.9"] and frame["peak_MB"].iloc[1] == 12345.0
    assert "12345" in results.with_suffix(".md").read_text()
    assert (tmp_path / "steps-resnet18-float32.png").stat().st_size > 1000
    assert not list(tmp_path.glob("*.part"))


def test_the_front_holds_what_nothing_beats() -> None:
    part = pandas.DataFrame(
        {"row": list("abcd"), "peak_MB": [10.0, 20.0, 30.0, 40.0], "time_ratio": [1.5, 1.6, 1.0, 1.2]}
    )
    assert list(fastest_front(part)["row"]) == ["a", "c"]
