"""train.py in real processes that start in a moment: forked from a server that has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train", "transfer.training.run"])
LIMIT = 60  # seconds; no run here takes ten


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
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"stderr{environment.get('RANK', '')}.txt"
    _start_server()
    process = CONTEXT.Process(target=_main, args=(folder, log, arguments, environment))
    process.start()
    return Job(process, log)


def _start_server() -> None:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT), before or ""])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def _main(folder: Path, log: Path, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    import torch
    import tqdm

    import train

    os.chdir(folder)
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    tqdm.tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves behind
    sys.exit(train.main(list(arguments)))
