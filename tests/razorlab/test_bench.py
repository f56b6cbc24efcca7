"""The step benchmark: rows, rounds that resume, the table and its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import MethodType, SimpleNamespace

import pandas
import pytest
import torch
from matplotlib import pyplot as plt

import backrazor as br
from razorlab.bench import measure, rows
from razorlab.bench.missing import report
from razorlab.bench.rows import MAIN, micro_batch, rows_of
from razorlab.commands import bench
from razorlab.tables import figures
from razorlab.tables.figures import BUDGET_ROWS, fastest_front


def test_rows_name_every_rival() -> None:
    labels = [row.label for row in rows_of("resnet18")]
    assert labels[0] == "dense" and set(MAIN) <= set(labels) and len(set(labels)) == len(labels)
    assert "save_on_cpu" not in labels


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("backbone", ["mobilenetv2", "vit_b16"])
def test_rivals_of_every_backbone_quick_ones_first(
    backbone: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "micro_batch", lambda *_: 1)
    monkeypatch.setattr(rows, "has_compiler", lambda: True)
    found = rows_of(backbone, precision)
    labels = [row.label for row in found]
    assert {"selective checkpointing by block", "compile", "compile, float8 activations"} <= set(labels)
    assert [row.budget for row in found if row.label.startswith(BUDGET_ROWS)] == [0.7, 0.5, 0.3, 0.1]
    assert ({"LoRA", "compact 0.97 + LoRA"} <= set(labels)) == (backbone == "vit_b16")
    assert {row.precision for row in found} == {precision}
    assert labels[: len(MAIN)] == list(MAIN)
    compiled = [row.compiled for row in found]
    assert compiled == sorted(compiled), "what is compiled comes last"
    monkeypatch.setattr(rows, "has_compiler", lambda: False)
    assert not any(row.compiled for row in rows_of(backbone, precision))


def small_row(backbone: str, label: str) -> rows.Row:
    (row,) = (replace(row, image=64, batch=2) for row in rows_of(backbone) if row.label == label)
    return row


def gradients(row: rows.Row) -> list[torch.Tensor]:
    step = row.build()
    step.forward().backward()
    return [p.grad for p in step.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_selective_checkpointing_holds_the_outputs_of_products(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "micro_batch", lambda *_: 1)
    labels = ("checkpointing by block", "selective checkpointing by block", "dense")
    found = [replace(small_row("mobilenetv2", label), precision=precision) for label in labels]
    block, selective, dense = (row.saved_bytes() for row in found)
    assert 2 * block < selective < 0.6 * dense
    for one, other in zip(gradients(found[1]), gradients(found[2]), strict=True):
        assert torch.equal(one, other)


def test_lora_trains_branches_and_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "micro_batch", lambda *_: 1)
    dense, lora, razored = (small_row("vit_b16", label) for label in ("dense", "LoRA", "compact 0.97 + LoRA"))
    step = lora.build()
    step.forward().backward()
    trained = {name for name, p in step.model.named_parameters() if p.grad is not None}
    assert trained and all(".lora_" in name or name.startswith("head.") for name in trained)
    assert razored.saved_bytes() < 0.5 * lora.saved_bytes() < 0.5 * dense.saved_bytes()


def test_the_compiler_keeps_what_its_rows_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through PyTorch's partitioner, which decides it, without inductor: that takes a minute for each."""
    compiler = torch.compile
    monkeypatch.setattr(rows, "micro_batch", lambda *_: 1)
    monkeypatch.setattr(rows, "has_compiler", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda model: compiler(model, backend="aot_eager_decomp_partition"))
    labels = ("compile", f"{BUDGET_ROWS}0.5", f"{BUDGET_ROWS}0.1", "compile, float8 activations")
    found = [small_row("resnet18", label) for label in labels]
    held = []
    for row in found:
        torch.compiler.reset()
        held.append(row.saved_bytes())
    whole, half, tenth, eight_bits = held
    assert 0.4 * whole < half < 0.6 * whole and tenth < 0.2 * whole and eight_bits < 0.5 * whole
    assert torch._functorch.config.activation_memory_budget == 1.0, "set while the step runs, and no longer"
    assert not torch._inductor.config.post_grad_fusion_options
    torch.compiler.reset()


def test_float8_is_less_than_bfloat16_also_of_short_lines() -> None:
    """Autocast's copies of 1 x 1 kernels: with a scale for each line they would take five bytes an element."""
    kept: dict[int, torch.Tensor] = {}
    model = torch.nn.Sequential(torch.nn.Conv2d(64, 256, 1), torch.nn.SiLU(), torch.nn.Conv2d(256, 64, 1))
    compiled = torch.compile(model, backend="aot_eager_decomp_partition")
    x, sizes = torch.randn(2, 64, 8, 8), []
    for float8 in (False, True):
        torch.compiler.reset()
        kept.clear()
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t)
        with rows._compiler_settings(None, float8), torch.autocast("cpu", torch.bfloat16), hooks:
            loss = compiled(x).square().mean()
        loss.backward()
        sizes.append(sum(t.nbytes for t in kept.values()))
    assert sizes[1] < 0.7 * sizes[0]
    torch.compiler.reset()


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Measuring processes of which "broken" dies; what took its turns together."""
    groups: list[list[str]] = []

    def peak(build: MethodType, **_: object) -> br.memory.Measurement:
        if build.__self__.label == "broken":
            raise RuntimeError(
                "the measured step failed in its process:\nTraceback\nInductorError: no g++\n\nSee there"
            )
        return br.memory.Measurement((1,), (1,), bare_samples=(0,))

    def times(turn: dict[str, MethodType], **_: object) -> dict[str, br.memory.Measurement]:
        groups.append(list(turn))
        if "broken" in turn:
            raise RuntimeError("the measuring process died with exit code -11; out of memory if it is -9")
        return {label: br.memory.Measurement(time_samples=((1.0, 1.0, 1.0),)) for label in turn}

    monkeypatch.setattr(br.memory, "measure_step", peak)
    monkeypatch.setattr(br.memory, "measure_steps", times)
    monkeypatch.setattr(measure, "in_fresh_process", lambda *_: 1)
    return groups


def test_a_row_that_fails_stops_no_other_and_is_named(broken: list[list[str]], tmp_path: Path) -> None:
    three = [rows.Row("resnet18", label) for label in ("dense", "broken", "compact 0.9")]
    failed = measure.measure_backbone(three, tmp_path, repeats=2, steps=1)
    assert failed == {(three[1], "peak"): "InductorError: no g++"} and ["dense", "compact 0.9"] in broken
    lines = report(three, tmp_path, 2, failed).splitlines()
    reason = "round 1, 2 of 2; peak failed: InductorError: no g++"
    assert lines == ["missing:", *(f"  resnet18 float32 broken, {what}: {reason}" for what in measure.QUANTITIES)]
    assert report([three[0], three[2]], tmp_path, 2, {}).startswith("nothing is missing")
    assert "compact 0.9, peak: round 3 of 3" in report(three[2:], tmp_path, 3, {})


def test_of_rows_that_take_turns_the_one_that_fails_is_found(broken: list[list[str]], tmp_path: Path) -> None:
    three = [rows.Row("resnet18", label) for label in ("dense", "broken", "compact 0.9")]
    failed = measure.measure_backbone(three, tmp_path, repeats=1, steps=1, what=("time",))
    assert broken == [["dense", "broken", "compact 0.9"], ["dense"], ["dense", "broken"], ["dense", "compact 0.9"]]
    assert list(failed) == [(three[1], "time")] and "exit code -11" in failed[three[1], "time"]
    assert all(measure.file_of(tmp_path, row, "time", 0).exists() for row in (three[0], three[2]))


def test_the_command_takes_main_rows_of_all_backbones_first_and_ends_with_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[tuple[str, str, str]] = []

    def record(rows: list[rows.Row], *_: object) -> measure.Failures:
        measured.extend((row.backbone, row.precision, row.label) for row in rows if row.label != "dense")
        return {(row, "peak"): "it is broken" for row in rows if row.compiled}

    def few(backbone: str, precision: str) -> list[rows.Row]:
        compiled = rows.Row(backbone, "compile", compiled=True, precision=precision)
        return [*(rows.Row(backbone, label, precision=precision) for label in ("dense", MAIN[1], "int8")), compiled]

    monkeypatch.setattr(bench, "measure_backbone", record)
    monkeypatch.setattr(bench, "rows_of", few)
    arguments = ["--skip-tests", "--backbones", "resnet18", "vit_b16", "--folder", str(tmp_path)]
    arguments += ["--results", str(tmp_path / "steps.csv"), "--precision", "float32", "bfloat16"]
    assert bench.main(arguments) == 1, "a row failed"
    networks = [(name, kind) for name in ("resnet18", "vit_b16") for kind in ("float32", "bfloat16")]
    assert measured == [(*network, label) for label in (MAIN[1], "int8", "compile") for network in networks]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "  vit_b16 bfloat16 compile, time: round 1, 2, 3 of 3; peak failed: it is broken"
    monkeypatch.setattr(bench, "measure_backbone", lambda *_: {})
    assert bench.main(arguments) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("failed:\nTraceback\n  torch.cuda.OutOfMemoryError: no\nValueError: first\nmore\n", "ValueError: first"),
        ("torch._inductor.exc.InductorError: CppCompileError: x\n\nSet A=1", "torch._inductor.exc.InductorError: "),
        ("the measuring process died with exit code -11", "the measuring process died with exit code -11"),
    ],
    ids=["last_error", "hints_after_it", "no_traceback"],
)
def test_the_reason_is_the_line_that_names_the_error(text: str, expected: str) -> None:
    assert measure.reason_of(text).startswith(expected)


def test_a_figure_of_all_rows_names_each_and_labels_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "micro_batch", lambda *_: 1)
    monkeypatch.setattr(rows, "has_compiler", lambda: True)
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure) or path)
    found = rows_of("vit_b16")
    part = pandas.DataFrame({"row": [row.label for row in found]})
    part = part.assign(backbone="vit_b16", batch=16, precision="float32")
    part["peak_MB"] = [100.0 + 30 * i for i in range(len(part))]
    part["time_ratio"] = [1.0 + 0.07 * (i * 7 % 11) for i in range(len(part))]
    part = part.assign(time_ratio_min=part["time_ratio"] - 0.02, time_ratio_max=part["time_ratio"] + 0.03)
    figures.time_against_peak(part, tmp_path / "figure.png")
    (figure,) = drawn
    figure.canvas.draw()
    (legend,) = figure.legends
    names = {text.get_text() for text in legend.get_texts()}
    alone = {row.label for row in found if row.budget is None}
    assert names == alone | {"Pareto front", "compile, budget"}
    box, whole = legend.get_window_extent(), figure.bbox
    assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
    labels = [text for text in figure.axes[0].texts if text.get_text()]
    assert sorted(text.get_text() for text in labels) == ["0.1", "0.3", "0.5", "0.7"]
    boxes = [text.get_window_extent() for text in labels]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    plt.close(figure)


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
    dense, compact = (json.loads(measure.file_of(folder, row, "time", 0).read_text()) for row in rows)
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
    file = measure.file_of(folder, dense, "peak", 0)
    assert file.exists()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    found = {
        measure.file_of(folder, row, "peak", 0) for row in (replace(dense, batch=4), replace(dense, device="cuda"))
    }
    monkeypatch.setattr(measure, "_commit", lambda: "abcdef")
    found.add(measure.file_of(folder, dense, "peak", 0))
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
