"""Tables come from records alone: means, spreads, ratios, missing cells, every format."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from matplotlib.path import Path as MplPath

from razorlab import __main__ as razorlab
from razorlab.records import write_record
from razorlab.tables import accuracy_against_peak, caption, load_runs, render, summarise, to_terminal, write_tables
from razorlab.tables.figures import plt
from razorlab.tables.labels import Labelled, label_points

RESULTS = {  # experiment: razor, sparsity, checkpointing, accuracies by seed, saved, peak, seconds
    "t/dense": ("none", 0.0, "none", (98.0, 99.0), 600e6, 700e6, 0.5),
    "t/checkpointing": ("none", 0.0, "block", (98.0, 99.0), 100e6, 240e6, 0.7),
    "t/compact90": ("compact", 0.9, "none", (97.0, 99.0), 30e6, 140e6, 0.6),
}


def make_records(root: Path) -> None:
    for name, (razor, sparsity, checkpointing, accuracies, saved, peak, seconds) in RESULTS.items():
        for seed, accuracy in enumerate(accuracies):
            record = {
                "experiment": name,
                "config_hash": f"hash-{name}",
                "seed": seed,
                "circumstances": {"date": "2026-01-01T00:00:00+00:00"},
                "config": {
                    "model": {"name": "net"},
                    "data": {"name": "digits"},
                    "method": {"name": "full"},
                    "razor": {"name": razor, "sparsity": sparsity},
                    "trainer": {"checkpointing": checkpointing},
                },
                "test": {"top1": accuracy, "top5": 100.0},
                "val": {"top1": accuracy},
                "memory": {"batch_size": 8, "image_size": 224, "saved_bytes": saved},
            }
            if seed == 0:  # one seed is measured, as razorlab measure does
                gradients = 0 if razor == "compact" else 20e6
                record["memory"] |= {"peak_bytes": peak, "step_seconds": seconds}
                record["memory"] |= {"weight_bytes": 20e6, "gradient_bytes": gradients, "optimizer_bytes": 10e6}
                record["memory"] |= {"total_bytes": peak + gradients + 30e6}
            path = root / name / str(seed) / "record.json"
            path.parent.mkdir(parents=True)
            write_record(path, record)


def test_mean_spread_and_ratio_to_the_dense_row(tmp_path: Path) -> None:
    make_records(tmp_path)
    summary = summarise(load_runs(tmp_path)).set_index("method")
    assert list(summary.index) == ["full, dense", "full, checkpointing by block", "full, compact 0.9"]
    compact = summary.loc["full, compact 0.9"]
    assert compact["accuracy"] == 98.0 and compact["accuracy_std"] == pytest.approx(2**0.5)
    assert compact["seeds"] == 2 and compact["peak_mb"] == 140 and compact["saved_mb"] == 30
    assert compact["saved_mb_ratio"] == pytest.approx(0.05) and compact["step_s_ratio"] == pytest.approx(1.2)
    assert (summary.loc["full, dense", [c for c in summary if c.endswith("_ratio")]] == 1).all()


def test_a_second_table_has_the_four_parts_and_their_sum(tmp_path: Path) -> None:
    make_records(tmp_path)
    runs = load_runs(tmp_path)
    summary = summarise(runs)
    shown = to_terminal(summary).split("\n\n")[1].splitlines()
    assert re.split(r"  +", shown[0].strip())[1:] == [heading for heading, _ in render.PARTS.values()]
    assert re.split(r"  +", shown[-1].strip()) == [
        "full, compact 0.9",
        "20.0",
        "0.0",
        "10.0",
        "140.0",
        "170.0 (0.227x)",
    ]
    text = [path.read_text() for path in write_tables(summary, runs, tmp_path / "out")]
    assert "total_mb" in text[0] and all("170.0 (0.227x)" in part for part in text[1:])
    assert text[2].count("\\toprule") == 2
    older = summary.assign(total_mb=float("nan"))
    assert "In all" not in to_terminal(older), "records from before the parts have the first table alone"


def test_a_row_that_was_not_run_is_there_and_says_so(tmp_path: Path) -> None:
    make_records(tmp_path)
    runs = load_runs(tmp_path)
    summary = summarise(runs, ["t/dense", "t/compact97"])
    paths = write_tables(summary, runs, tmp_path / "out")
    rows = list(csv.DictReader(paths[0].read_text().splitlines()))
    assert rows[-1]["method"] == "compact97" and rows[-1]["status"] == "not run" and rows[-1]["accuracy"] == ""
    assert [row["status"] for row in rows[:-1]] == ["run"] * 3
    assert "not run" in to_terminal(summary).splitlines()[-1]


def test_every_format_holds_the_same_figures(tmp_path: Path) -> None:
    make_records(tmp_path)
    assert razorlab.main(["tables", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    markdown, latex = (tmp_path / "out" / name for name in ("table.md", "table.tex"))
    for figure in ("140.0 (0.2x)", "30.0", "0.600 (1.2x)"):
        assert figure in markdown.read_text() and figure in latex.read_text()
    assert "\\toprule" in latex.read_text() and "98.00 $\\pm$ 1.41" in latex.read_text()
    assert "batch 8, 224 px" in markdown.read_text()
    assert (tmp_path / "out" / "accuracy_against_peak.png").read_bytes().startswith(b"\x89PNG")


def test_the_terminal_table_fits_a_hundred_columns(tmp_path: Path) -> None:
    make_records(tmp_path)
    runs = load_runs(tmp_path)
    runs["test_top1"] *= 1.0123 - 0.003 * runs.index  # ratios of three digits everywhere
    runs[["saved_bytes", "peak_bytes", "total_bytes", "gradient_bytes"]] *= 3.777
    runs["step_seconds"] *= 37.77
    shown = to_terminal(summarise(runs[runs["seed"] == 0]))
    assert max(map(len, shown.splitlines())) <= 100


def test_two_configurations_of_one_experiment_are_both_shown_and_told_apart(tmp_path: Path) -> None:
    make_records(tmp_path)
    newer = {**json.loads((tmp_path / "t/dense/0/record.json").read_text()), "config_hash": "new"}
    newer["circumstances"] = {"date": "2026-02-01T00:00:00+00:00"}
    newer["config"]["optim"] = {"lr": 0.01}
    newer["config"]["seed"] = 7  # no setting
    newer["memory"]["total_bytes"] *= 2
    (tmp_path / "t/dense/new").mkdir()
    write_record(tmp_path / "t/dense/new/record.json", newer)
    runs = load_runs(tmp_path)
    assert list(runs.query("experiment == 't/dense' and newest")["config_hash"]) == ["new"]
    summary = summarise(runs).set_index("method")
    older, newest = "full, dense [optim.lr=null]", "full, dense [optim.lr=0.01]"
    assert set(summary.index) == {older, newest, "full, checkpointing by block", "full, compact 0.9"}
    assert summary.loc[older, "seeds"] == 2 and summary.loc[newest, "seeds"] == 1
    assert summary.loc[older, "total_mb_ratio"] == 0.5, "ratios are to the newest dense row"


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 99}'])
def test_a_damaged_record_or_an_empty_folder_is_one_line(tmp_path: Path, capsys, text: str) -> None:
    assert razorlab.main(["tables", str(tmp_path / "absent")]) == 2
    assert razorlab.main(["tables", str(tmp_path)]) == 2
    (tmp_path / "record.json").write_text(text)
    assert razorlab.main(["tables", str(tmp_path)]) == 2
    assert razorlab.main(["tables", str(tmp_path), "--expect", "nosuch"]) == 2
    assert all(line.startswith("razorlab tables: ") for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize("peaks", [(640, 264, 84, 81), (700, 240, 140, 138), (100, 101, 102, 103), (5, 600, 610, 1900)])
def test_labels_of_a_figure_touch_neither_points_nor_lines_nor_each_other(peaks: tuple[int, ...]) -> None:
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    points = [Labelled(peak, 98 - 0.2 * i, f"row {i}\n98.0 ± 0.3%, {peak} MB", 0.3) for i, peak in enumerate(peaks)]
    line = [(p.x, p.y) for p in points]
    axes.plot(*zip(*line, strict=True), "o--")
    axes.set_xlim(0, 1.1 * max(peaks))
    axes.set_ylim(95, 100)
    boxes = label_points(axes, points, line=line)
    frame = axes.get_window_extent()
    for i, box in enumerate(boxes):
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
        assert not any(box.contains(*axes.transData.transform((p.x, p.y))) for p in points)
        for drawn in axes.lines:  # the one through the points, and those that lead to labels; these end at theirs
            ends = axes.transData.transform(drawn.get_xydata())
            inner = box.expanded(1 - 2 / box.width, 1 - 2 / box.height)
            assert not MplPath(ends).intersects_bbox(inner, filled=False)
    plt.close(figure)


def test_the_caption_says_how_many_images_a_point_is(tmp_path: Path) -> None:
    make_records(tmp_path)
    runs = load_runs(tmp_path)
    assert "2 seeds" in caption(runs) and "test images" not in caption(runs)
    runs["test_images"] = 719
    assert "719 test images, of which one is 0.14 points" in caption(runs)


def test_squares_are_the_rows_without_a_razor_whatever_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_records(tmp_path)
    summary = summarise(load_runs(tmp_path))
    summary.loc[len(summary)] = summary.iloc[1].to_dict() | {"method": "full, int8, checkpointing", "razor": "int8"}
    summary.loc[len(summary)] = summary.iloc[0].to_dict() | {"method": "last"}
    drawn = []
    errorbar = plt.Axes.errorbar
    monkeypatch.setattr(plt.Axes, "errorbar", lambda *a, fmt, **k: drawn.append(fmt) or errorbar(*a, fmt=fmt, **k))
    accuracy_against_peak(summary, tmp_path / "figure.png")
    assert drawn == ["s", "s", "o", "o", "s"]
