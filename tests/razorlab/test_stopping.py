"""Signals, full disks, lost files and workers: one line, a stated exit code, and the run goes on to the same end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import TINY, write_tree
from forked import Job, start
from test_processes import losses, newest_step, only, wait_for

from razorlab.errors import Interrupted
from razorlab.training.stopping import StopSignals

LONG = (
    *("trainer.epochs=16", "trainer.batch_size=20", "data.train_fraction=0.06", "trainer.save_every=2"),
    *("data.val_fraction=0.02", "data.test_fraction=0.02"),
    *("data.train_transform=random_crop", "model.drop_rate=0.2", "optim.lr=0.01"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder, *TINY, *LONG).end()[0] == 0
    return losses(folder)


def goes_on(folder: Path, whole: list[float], *extra: str) -> None:
    assert start(folder, *TINY, *LONG, *extra).end()[0] == 0
    assert "resumed after epoch" in only(folder, "log.txt").read_text()
    assert losses(folder) == whole


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_it_came_in_and_exits_with_its_code(
    tmp_path: Path, whole: list[float], number: signal.Signals, code: int
) -> None:
    job = start(tmp_path, *TINY, *LONG, "trainer.save_every=1000")
    wait_for(tmp_path, job)
    os.kill(job.process.pid, number)
    ended, lines = job.end()
    assert ended == code and lines[-1] == f"train.py: stopped by {number.name}; the same command goes on from here"
    goes_on(tmp_path, whole)


def test_a_run_stopped_within_an_epoch_goes_on_with_other_workers(tmp_path: Path, whole: list[float]) -> None:
    job = start(tmp_path, *TINY, *LONG, "trainer.workers=1")
    wait_for(tmp_path, job, step=5)
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.end()[0] == 143
    goes_on(tmp_path, whole, "trainer.workers=0")


def test_a_second_interrupt_stops_at_once(tmp_path: Path, whole: list[float]) -> None:
    job = start(tmp_path, *TINY, *LONG)
    wait_for(tmp_path, job)
    os.kill(job.process.pid, signal.SIGINT)
    while "stopping at the end of this step" not in job.log.read_text():
        assert job.process.is_alive()
        time.sleep(0.001)
    os.kill(job.process.pid, signal.SIGINT)
    assert job.end()[0] in (-signal.SIGINT, 130)  # 130 where the step had ended in between
    goes_on(tmp_path, whole)


def test_a_full_disk_is_one_line_and_the_checkpoints_before_it_stay(tmp_path: Path, whole: list[float]) -> None:
    job = start(tmp_path, *TINY, *LONG)
    wait_for(tmp_path, job)
    folder = only(tmp_path, "checkpoints")
    for step in range(100):  # wherever the run is: the next checkpoints go to a device without room
        (folder / f"step-{step:08d}.pt.part").symlink_to("/dev/full")
    code, lines = job.end()
    assert code == 2 and "No space left on device" in lines[-1] and "goes on after step-" in lines[-1]
    assert lines[-1].startswith("train.py: ") and "Traceback" not in "".join(lines)
    goes_on(tmp_path, whole)


def remove_an_image(folder: Path, job: Job) -> str:
    for path in (folder / "tree").rglob("*.png"):
        path.unlink()
    return "cannot be read"


def kill_a_worker(folder: Path, job: Job) -> str:
    while not (workers := psutil.Process(job.process.pid).children()):
        time.sleep(0.001)
    workers[0].kill()
    return "a data worker died"


@pytest.mark.parametrize("fault", [remove_an_image, kill_a_worker])
def test_lost_data_is_one_line_and_the_run_goes_on_when_it_is_back(
    tmp_path: Path, fault: Callable[[Path, Job], str]
) -> None:
    source = ("data=folder", f"data.root={tmp_path}/tree", "data.val_fraction=0.2", "data.test_fraction=0.2")
    run = (*TINY, *source, "trainer.epochs=60", "trainer.batch_size=4", "trainer.workers=1", "data.cache=false")
    write_tree(tmp_path / "tree")
    job = start(tmp_path, *run)
    wait_for(tmp_path, job)
    words = fault(tmp_path, job)
    code, lines = job.end()
    assert code == 2 and lines[-1].startswith("train.py: ") and words in lines[-1], lines
    assert "Traceback" not in "".join(lines)
    saved = newest_step(tmp_path)
    assert saved > 0 and not list(tmp_path.rglob("record.json"))
    write_tree(tmp_path / "tree")
    job = start(tmp_path, *run, "trainer.workers=0")
    wait_for(tmp_path, job, step=saved + 1)
    job.process.kill()
    job.end()
    assert f"step {saved}" in only(tmp_path, "log.txt").read_text()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    code, lines = start(tmp_path, *TINY, "paths.outputs=/proc/none").end()
    assert code == 2 and "paths.outputs=/proc/none cannot be written" in lines[-1] and len(lines) == 1


def test_a_scheduler_s_signal_is_handed_on_after_the_stop() -> None:
    """SLURM's warning before time is up is submitit's to handle: it queues the job again, once that is saved."""
    handed_on: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: handed_on.append(number))
    interrupt = signal.getsignal(signal.SIGINT)  # a process started in the background may ignore it
    try:
        with pytest.raises(Interrupted, match="SIGUSR2"), StopSignals(announce=False) as stop:
            stop.check()
            os.kill(os.getpid(), signal.SIGUSR2)
            assert not handed_on
            stop.check()
        assert handed_on == [signal.SIGUSR2] and signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGUSR2, before)
