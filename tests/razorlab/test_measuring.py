"""The measurement after a run: the record first, the device's memory free, a failure no end of the run."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from conftest import TINY

import backrazor as br
from razorlab.records import read_record
from razorlab.tables import load_runs, summarise
from razorlab.tables.render import cells
from razorlab.training import measuring, run

ALL = (*TINY, "trainer.steps=1", "data.train_fraction=0.1", "trainer.measure.mode=all", "trainer.measure.repeats=1")
TRACEBACK = "the measured step failed in its process:\nTraceback:\n  File x\ntorch.OutOfMemoryError: CUDA out of memory"


def the_record(folder: Path) -> Path:
    (path,) = folder.rglob("record.json")
    return path


def test_a_failed_measurement_is_a_warning_and_a_cell_that_says_so(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(TRACEBACK)

    monkeypatch.setattr(br.memory, "measure_step", fail)
    code, lines = command(*ALL)
    assert code == 0, lines
    record = read_record(the_record(tmp_path))
    assert record["memory"]["not_measured"] == "torch.OutOfMemoryError: CUDA out of memory"
    assert record["memory"]["saved_bytes"] > 0 and "peak_bytes" not in record["memory"]
    (warning,) = (entry for entry in caplog.records if "not measured" in entry.getMessage())
    assert "CUDA out of memory" in warning.getMessage() and "\n" not in warning.getMessage()
    assert cells(summarise(load_runs(tmp_path)))["Peak, MB"].tolist() == ["not measured"]


def test_record_and_free_memory_come_before_the_measurement(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, models = [], []
    assemble, release = run.assemble, measuring.release_device_memory

    def watched(*arguments):
        network = assemble(*arguments)
        models.append(weakref.ref(network.model))
        return network

    def measure(*_: object, **__: object) -> br.memory.Measurement:
        gc.collect()
        seen.append((the_record(tmp_path).is_file(), models[0]() is None))
        return br.memory.Measurement((5,), (7,), ((1.0, 1.0, 1.0),))

    monkeypatch.setattr(run, "assemble", watched)
    monkeypatch.setattr(measuring, "release_device_memory", lambda: seen.append("released") or release())
    monkeypatch.setattr(br.memory, "measure_step", measure)
    assert command(*ALL)[0] == 0
    assert seen == ["released", (True, True)]
    memory = read_record(the_record(tmp_path))["memory"]
    assert memory["peak_bytes"] == 5 and "not_measured" not in memory


def test_cached_device_memory_is_given_back_only_where_cuda_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given.append(True))
    measuring.release_device_memory()
    assert given == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    measuring.release_device_memory()
    assert given == [True]


@pytest.mark.slow
def test_a_run_that_was_cut_off_while_measuring_is_measured_by_the_same_command(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(br.memory, "measure_step", cut)
        assert command(*ALL)[0] == 130
    before = read_record(the_record(tmp_path))
    assert before["memory"]["not_measured"] == measuring.PENDING
    measured = br.memory.Measurement((5,), (7,), ((1.0, 1.0, 1.0),))
    monkeypatch.setattr(br.memory, "measure_step", lambda *_, **__: measured)
    assert command(*ALL)[0] == 0
    after = json.loads(the_record(tmp_path).read_text())
    assert after["memory"]["peak_bytes"] == 5 and "not_measured" not in after["memory"]
    assert after["test"] == before["test"] and after["schema"] == 1
