"""Several processes for one run: the curves of one process, one folder, every test image once, one message."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, files_below, write_tree
from forked import ROOT, Job, start, start_ranks

from razorlab.records import read_record

# Batch norm frozen and no dropout: what one process computes. 33 images do not divide by 2, nor 91 test images.
SHARED = (
    *("trainer.epochs=2", "trainer.batch_size=33", "data.train_fraction=0.06", "optim=sgd", "optim.lr=0.05"),
    *("method.bn_stats=frozen", "method.bn_affine=frozen", "data.train_transform=random_crop", "trainer.save_every=2"),
    "data.test_fraction=0.0506",
)


def only(folder: Path, name: str) -> Path:
    (found,) = folder.rglob(name)
    return found


def losses(folder: Path) -> list[float]:
    rows = csv.DictReader(only(folder, "metrics.csv").read_text().splitlines())
    return [float(row[name]) for row in rows for name in ("train_loss", "val_loss")]


def ends(jobs: list[Job]) -> tuple[list[int], list[str]]:
    """Exit codes, and all that was printed."""
    results = [job.end() for job in jobs]
    return [code for code, _ in results], [line for _, lines in results for line in lines]


def test_two_processes_have_the_losses_of_one_and_count_every_image_once(tmp_path: Path) -> None:
    razored = ("razor=compact", "razor.sparsity=0.5", "trainer.drop_last=false")
    one = start(tmp_path / "one", *TINY, *SHARED, *razored)
    two = start_ranks(tmp_path / "two", 2, *TINY, *SHARED, *razored)
    parts = start(tmp_path / "parts", *TINY, *SHARED, *razored, "trainer.micro_batch=8")
    assert one.end()[0] == parts.end()[0] == 0
    codes, printed = ends(two)
    assert codes == [0, 0]
    for other in ("two", "parts"):
        assert losses(tmp_path / other) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    records = [read_record(only(tmp_path / name, "record.json")) for name in ("one", "two")]
    assert records[0]["test"]["images"] == records[1]["test"]["images"] == 91
    assert records[0]["test"]["loss"] == pytest.approx(records[1]["test"]["loss"], rel=1e-4)
    assert records[1]["circumstances"]["processes"] == 2
    names = [re.sub(r"events\..*", "events", name) for name in files_below(tmp_path / "two" / "outputs")]
    assert names == [re.sub(r"events\..*", "events", name) for name in files_below(tmp_path / "one" / "outputs")]
    assert sum("epoch 1/2" in line for line in printed) == 1, "one log"


@pytest.mark.slow
def test_two_processes_stop_at_one_step_and_go_on(tmp_path: Path) -> None:
    arguments = (*TINY, *SHARED, "trainer.epochs=40", "model.drop_rate=0.2")
    jobs = start_ranks(tmp_path / "cut", 2, *arguments)
    wait_for(tmp_path / "cut", jobs[0])
    os.kill(jobs[1].process.pid, signal.SIGTERM)
    codes, printed = ends(jobs)
    assert codes == [143, 143] and sum(line.startswith("train.py: stopped by SIGTERM") for line in printed) == 1
    assert ends(start_ranks(tmp_path / "cut", 2, *arguments))[0] == [0, 0]
    assert ends(start_ranks(tmp_path / "whole", 2, *arguments))[0] == [0, 0]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_one_process_goes_on_with_what_two_began(tmp_path: Path) -> None:
    arguments = (*TINY, *SHARED, "trainer.epochs=40")
    jobs = start_ranks(tmp_path, 2, *arguments)
    wait_for(tmp_path, jobs[0])
    os.kill(jobs[0].process.pid, signal.SIGTERM)
    assert ends(jobs)[0] == [143, 143]
    code, lines = start(tmp_path, *arguments).end()
    assert code == 0 and any("saved by 2 processes, now 1" in line for line in lines)


def test_a_killed_process_ends_the_job_with_one_message(tmp_path: Path) -> None:
    jobs = start_ranks(tmp_path, 2, *TINY, *SHARED, "trainer.epochs=400")
    wait_for(tmp_path, jobs[0])
    jobs[1].process.kill()
    codes, printed = ends(jobs)
    assert codes == [4, -9]
    said = [line for line in printed if "epoch" not in line and line.startswith("train.py")]
    assert len(said) == 1 and "another process of this job ended" in said[0] and "Traceback" not in "".join(printed)


def test_what_fails_in_one_process_is_said_once(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree", images=6)
    (root / "class1" / "3.png").write_bytes(b"broken")
    folder = ("data=folder", f"data.root={root}", "data.val_fraction=0.2", "data.test_fraction=0.2")
    jobs = start_ranks(tmp_path / "run", 2, *TINY, *folder)
    codes, printed = ends(jobs)
    assert 2 in codes and 0 not in codes
    said = [line for line in printed if line.startswith("train.py")]
    assert len(said) == 1 and "3.png" in said[0] and not (tmp_path / "run" / "outputs").exists()
    jobs = start_ranks(tmp_path / "few", 2, *TINY, *SHARED, "trainer.batch_size=1")
    codes, printed = ends(jobs)
    assert codes == [2, 2] and sum("trainer.batch_size=1" in line for line in printed) == 1


@pytest.mark.slow
def test_torchrun_starts_two_processes_that_share_a_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "train.py")]
    done = subprocess.run(
        [*command, *TINY, *SHARED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert read_record(only(tmp_path, "record.json"))["circumstances"]["processes"] == 2
    assert done.stderr.count("epoch 2/2") == 1


@pytest.mark.slow
def test_submitit_tasks_share_a_run(tmp_path: Path) -> None:
    """On SLURM the launcher is submitit_slurm; submitit_local starts the same tasks on this machine."""
    launcher = (
        "-m",
        "hydra/launcher=submitit_local",
        "hydra.launcher.tasks_per_node=2",
        "hydra.launcher.timeout_min=2",
    )
    code, lines = start(tmp_path, *launcher, *TINY, *SHARED, OMP_NUM_THREADS="1").end()
    assert code == 0, lines
    assert read_record(only(tmp_path, "record.json"))["circumstances"]["processes"] == 2


def wait_for(folder: Path, job: Job, step: int = 1) -> None:
    """Wait until a checkpoint of ``step`` or a later one is there."""
    while newest_step(folder) < step:
        assert job.process.is_alive(), job.log.read_text()
        time.sleep(0.01)


def newest_step(folder: Path) -> int:
    return max((int(path.stem.partition("-")[2]) for path in folder.rglob("step-*.pt")), default=0)
