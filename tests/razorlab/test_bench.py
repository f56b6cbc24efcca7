"""The step benchmark: rows, rounds that resume, the table and its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch

import backrazor as br
from razorlab.bench import measure, rows
from razorlab.bench.rows import MAIN, micro_batch, rows_of
from razorlab.tables.figures import fastest_front


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


def test_table_holds_the_four_parts_and_their_sum(measured: tuple[list, Path], tmp_path: Path) -> None:
    rows, folder = measured
    table = measure.table_of(rows, folder)
    dense, compact = table
    model = rows[0].build().model
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad) / 1e6
    for line in table:
        assert line["weights_MB"] == pytest.approx(br.memory.weight_bytes(model) / 1e6, abs=0.06)
        assert line["gradients_MB"] == line["optimizer_MB"] == pytest.approx(trained, abs=0.06)
        parts = (line[f"{name}_MB"] for name in ("weights", "gradients", "optimizer", "peak"))
        assert line["total_MB"] == pytest.approx(sum(parts), abs=0.21)
        assert line["above_bare_MB"] > line["weights_MB"]
    assert dense["total_ratio"] == 1
    assert compact["total_ratio"] == pytest.approx(dense["total_MB"] / compact["total_MB"], abs=0.01)
    results = tmp_path / "steps.csv"
    measure.write(table, results, "python -m razorlab bench")
    assert all(name in results.with_suffix(".md").read_text() for name in measure.WHOLE)
    older = [{name: None if name in measure.WHOLE else value for name, value in line.items()} for line in table]
    measure.write(older, tmp_path / "older.csv", "python -m razorlab bench")
    assert not any(name in (tmp_path / "older.md").read_text() for name in measure.WHOLE)


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
    measure.write(table, results, "python -m razorlab bench")
    table[1]["peak_MB"] = 12345.0
    measure.write(table[1:], results, "python -m razorlab bench")
    frame = pandas.read_csv(results)
    assert list(frame["row"]) == ["dense", "compact 0.9"] and frame["peak_MB"].iloc[1] == 12345.0
    assert "12345" in results.with_suffix(".md").read_text()
    assert (tmp_path / "steps-resnet18-float32.png").stat().st_size > 1000
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(("column", "other"), [("device", "NVIDIA H100"), ("batch", 128), ("git_commit", "1e10")])
def test_another_device_batch_or_commit_is_another_line(
    measured: tuple[list, Path], tmp_path: Path, column: str, other: object
) -> None:
    table, results = measure.table_of(*measured), tmp_path / "steps.csv"
    measure.write(table, results, "first")
    measure.write([{**line, column: other, "peak_MB": 54321.0} for line in table], results, "second")
    frame = pandas.read_csv(results, dtype={"git_commit": str})
    assert list(frame["command"]) == ["first"] * 2 + ["second"] * 2
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert len(figures) == (1 if column == "git_commit" else 2), figures
    sections = results.with_suffix(".md").read_text().count("## resnet18")
    assert sections == len(figures), "of several commits the newest is shown"
    measure.write([{**line, column: other} for line in table], results, "third")
    assert list(pandas.read_csv(results)["command"]) == ["first"] * 2 + ["third"] * 2


def test_files_of_other_batches_devices_and_commits_are_other_files(
    measured: tuple[list, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (dense, _), folder = measured
    file = measure._file(folder, dense, "peak", 0)
    assert file.exists()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    found = {measure._file(folder, row, "peak", 0) for row in (replace(dense, batch=4), replace(dense, device="cuda"))}
    monkeypatch.setattr(measure, "_commit", lambda: "abcdef")
    found.add(measure._file(folder, dense, "peak", 0))
    assert len(found) == 3 and file not in found


def test_the_share_on_a_gpu_is_that_of_the_kernels_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patched: operators of 30 and 20 microseconds on the device, a step of 0.2 ms between its events."""
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def elapsed_time(self, end: Event) -> float:
            assert calls[-1] == "synchronize", "an event is read when the device has reached it"
            return 0.2

    def event(name: str, microseconds: float) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_time_total=microseconds)

    class Profile:
        function_events = (event("backrazor::topk_pack", 30.0), event("aten::mm", 99.0), event("backrazor::mask", 20.0))

        def __init__(self, use_device: str) -> None:
            assert use_device == "cuda"

        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    model = torch.nn.Linear(2, 1)
    step = br.memory.Step(model, lambda: calls.append("forward") or model(torch.ones(1, 2)).sum())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    monkeypatch.setattr(measure, "profile", Profile)
    assert measure._share_on_the_device(step) == pytest.approx(50 / 200)
    assert calls == ["record", "forward", "record", "synchronize"]


def test_what_save_on_cpu_pins_is_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    row = rows.Row("resnet18", "save_on_cpu", offload=True, device="cuda")
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_AVPHYS_PAGES": 10**7, "SC_PAGE_SIZE": 4096}[name])
    for pinned, expected in (
        (25_000_000_000, "warning: save_on_cpu pins about 25.0 GB of memory, of which 41.0 GB are free"),
        (1_000_000_000, "save_on_cpu pins about 1.0 GB of memory, of which 41.0 GB are free"),
    ):
        dense = [SimpleNamespace(saved_bytes=pinned)]
        monkeypatch.setattr(rows, "predictions", lambda row, batches, dense=dense: dense if not row.offload else None)
        assert rows.pinning_notice(row) == expected


def test_the_front_holds_what_nothing_beats() -> None:
    part = pandas.DataFrame(
        {"row": list("abcd"), "peak_MB": [10.0, 20.0, 30.0, 40.0], "time_ratio": [1.5, 1.6, 1.0, 1.2]}
    )
    assert list(fastest_front(part)["row"]) == ["a", "c"]
