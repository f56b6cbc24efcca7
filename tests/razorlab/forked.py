"""train.py in real processes that start in a moment: forked from a server that has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import tqdm

from razorlab.commands import train
from razorlab.training.run import execute
from razorlab.training.state import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
WRITE = write_checkpoint.__code__
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train", "razorlab.training.run", "timm.models", "PIL.PngImagePlugin"])
LIMIT = 300  # seconds; no run here takes ten on an idle machine


@dataclass
class Job:
    """A process and the file that its stderr goes to."""

    process: multiprocessing.process.BaseProcess
    log: Path

    def end(self) -> tuple[int, list[str]]:
        """Wait for its end; returns the exit code (minus the signal's number for a death by signal) and stderr."""
        self.process.join(LIMIT)
        assert self.process.exitcode is not None, f"still running: {self.log.read_text()}"
        return self.process.exitcode, self.log.read_text().splitlines()


def start(folder: Path, *arguments: str, **environment: str) -> Job:
    """Start ``train.py arguments`` with ``folder`` as its working directory."""
    return _start(_train, folder, arguments, environment)


def start_config(folder: Path, config: dict[str, Any]) -> Job:
    """Start the run that ``config`` describes: half a second sooner than through the command line."""
    return _start(execute, folder, (config,), {})


def start_counted(folder: Path, config: dict[str, Any], counts: Path, deadly: dict[str, int] | None = None) -> Job:
    """As ``start_config``, in a process that counts its events, and kills itself at one of them.

    Args:
        counts: where a run that comes to its end writes how many there were: a name and a number per line.
        deadly: name of an event -> which of them is the last thing that the process does.
    """
    return _start(_counted, folder, (config, counts, deadly or {}), {})


def _counted(config: dict[str, Any], counts: Path, deadly: dict[str, int]) -> None:
    """``calls``: of any function in Python. ``writes``: those while a checkpoint is half written."""
    seen = {"calls": 0, "writes": 0}
    writing = False

    def call(frame: types.FrameType, _event: str, _argument: object) -> Callable[..., object] | None:
        nonlocal writing
        writing = writing or frame.f_code is WRITE
        seen["calls"] += 1
        seen["writes"] += writing
        if any(seen[name] == last for name, last in deadly.items()):
            os.kill(os.getpid(), signal.SIGKILL)
        return inside if frame.f_code is WRITE else None

    def inside(_frame: types.FrameType, event: str, _argument: object) -> Callable[..., object]:
        nonlocal writing
        writing = event != "return"
        return inside

    sys.settrace(call)
    execute(config)
    sys.settrace(None)
    counts.write_text("".join(f"{name} {number}\n" for name, number in seen.items()))


def start_ranks(folder: Path, size: int, *arguments: str) -> list[Job]:
    """Start ``train.py arguments`` in ``size`` processes that share the job, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [start(folder, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(size)]


def _train(*arguments: str) -> None:
    sys.exit(train.main(list(arguments)))


def _start(function: Callable[..., object], folder: Path, arguments: tuple, environment: dict[str, str]) -> Job:
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"stderr{environment.get('RANK', '')}.txt"
    _start_server()
    process = CONTEXT.Process(target=_main, args=(function, folder, log, arguments, environment))
    process.start()
    return Job(process, log)


def _start_server() -> None:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT), before or ""])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def _main(
    function: Callable[..., object], folder: Path, log: Path, arguments: tuple, environment: dict[str, str]
) -> None:
    multiprocessing.set_start_method("fork", force=True)  # as in any other process, for data workers
    os.chdir(folder)
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    tqdm.tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves behind
    function(*arguments)
