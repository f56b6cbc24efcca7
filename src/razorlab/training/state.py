"""Checkpoints: written whole or not at all, verified before use, read back without unpickling objects.

A file is what ``torch.save`` writes, then one line with the format and the SHA-256 of all before it; ``torch.load``
reads it as it stands. ``step-<n>.pt`` is all that a run needs to go on after step n, ``best-<n>.pt`` the weights that
scored best so far, after step n.
"""

from __future__ import annotations

import hashlib
import pickle
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from razorlab.errors import UserError
from razorlab.files import PARTIAL, atomic_write
from razorlab.training.monitor import LOGGER

FORMAT = 2
LABEL = f"\nbackrazor checkpoint {FORMAT} sha256 ".encode()
TRAILER = len(LABEL) + 64 + 1  # label, hex digest, newline
OVER = "trainer.resume=never starts the run over"


class CannotWrite(UserError):
    """A checkpoint could not be written."""


class Damaged(Exception):
    """A file is not what was written. Its text says in what way."""


def random_state() -> dict[str, Any]:
    """Return the state of every random generator that training draws from, in types that load without pickle."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, spare = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), spare],
    }
    if torch.cuda.is_initialized():  # asking would make a context of some hundred MB in a run on the CPU
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Undo ``random_state``."""
    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, spare = state["python"]
    random.setstate((version, tuple(internal), spare))
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


class _Hashing:
    """Passes bytes on to ``file`` and keeps their digest, and the error that ``torch.save`` would hide."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` to ``path``: whole or not at all.

    Raises:
        OSError: no room, no right, or no folder.
    """
    with atomic_write(path) as file:
        hashing = _Hashing(file)
        try:
            torch.save(dict(content), hashing)
        except RuntimeError:  # torch's archive writer, when it cannot finish
            if hashing.error is None:
                raise
            raise hashing.error from None
        file.write(LABEL + hashing.digest.hexdigest().encode() + b"\n")


def verify_checkpoint(path: Path) -> None:
    """Compare the file with its checksum.

    Raises:
        Damaged: it differs, or the file has none of this format.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            left = path.stat().st_size - TRAILER
            while left > 0 and (data := file.read(min(left, 1 << 20))):
                digest.update(data)
                left -= len(data)
            trailer = file.read()
    except OSError as error:
        raise Damaged(error.strerror or type(error).__name__) from error
    if not trailer.startswith(LABEL):
        raise Damaged(f"no checkpoint of format {FORMAT}, or cut off")
    if trailer[len(LABEL) :] != digest.hexdigest().encode() + b"\n":
        raise Damaged("its checksum differs")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what ``write_checkpoint`` wrote.

    Raises:
        Damaged: the file is not what was written.
    """
    verify_checkpoint(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise Damaged(type(error).__name__) from error


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they are; it exists.
        config_hash: what a checkpoint must carry to be resumed from.
        keep: how many of the newest stay, besides the best weights that they need.
    """

    def __init__(self, folder: Path, config_hash: str, keep: int) -> None:
        self.folder, self.config_hash, self.keep = folder, config_hash, keep
        self.last: Path | None = None  # the newest that is known to be good

    def save(self, state: Mapping[str, Any]) -> None:
        """Write ``state``, whose ``step`` names the file, then remove what is no longer needed.

        Raises:
            CannotWrite: as its text says; the older checkpoints are as they were.
        """
        self.last = self._write(self._path("step", state["step"]), state)
        self._prune()

    def save_best(self, step: int, model: Mapping[str, Any]) -> None:
        """Write the best weights so far, which are those after ``step``.

        Raises:
            CannotWrite: as ``save``.
        """
        self._write(self._path("best", step), {"step": step, "model": model})

    def best(self, step: int) -> Path:
        """Return the file of the best weights, which are those after ``step``."""
        return self._path("best", step)

    def newest(self) -> dict[str, Any] | None:
        """Return the newest state that is whole, None where there is none at all.

        A damaged one is reported and the one before is used; files newer than the one in use are removed, for the run
        will write them again.

        Raises:
            UserError: all are damaged, or one belongs to another configuration.
        """
        for path in self.folder.glob(f"*{PARTIAL}"):
            path.unlink()
        damaged = None
        for path in reversed(self._all("step")):
            try:
                state = self._read(path)
            except Damaged as error:
                damaged = f"{path} is damaged ({error})"
                LOGGER.warning("%s; the checkpoint before it is used", damaged)
                continue
            self.last = path
            self._forget_after(state["step"])
            return state
        if damaged:
            raise UserError(f"trainer.resume=auto: {damaged}, and so is every other checkpoint; {OVER}")
        return None

    def _read(self, path: Path) -> dict[str, Any]:
        state = read_checkpoint(path)
        if state["config_hash"] != self.config_hash:
            raise UserError(
                f"trainer.resume=auto: {path} belongs to configuration {state['config_hash']}, this is "
                f"{self.config_hash}; {OVER}"
            )
        if state["best"]["step"]:
            try:
                verify_checkpoint(self.best(state["best"]["step"]))
            except Damaged as error:
                raise Damaged(f"the best weights it needs, {self.best(state['best']['step']).name}: {error}") from error
        return state

    def _path(self, kind: str, step: int) -> Path:
        return self.folder / f"{kind}-{step:08d}.pt"

    def _all(self, kind: str) -> list[Path]:
        """Every checkpoint of a kind, oldest first."""
        return sorted(path for path in self.folder.glob(f"{kind}-*.pt") if re.fullmatch(r"\w+-\d{8,}\.pt", path.name))

    def _write(self, path: Path, content: Mapping[str, Any]) -> Path:
        try:
            write_checkpoint(path, {"config_hash": self.config_hash, **content})
        except OSError as error:
            good = f"goes on after {self.last.name}" if self.last else "starts at the beginning"
            raise CannotWrite(
                f"{path} cannot be written ({error.strerror}): make room or mend the folder; the same command {good}"
            ) from error
        return path

    def _prune(self) -> None:
        """Keep the newest checkpoints and the best weights that each of them stands on."""
        steps = self._all("step")
        kept, best = steps[-self.keep :], self._all("best")
        needed = {max((b for b in best if _step(b) <= _step(path)), key=_step, default=None) for path in kept}
        for path in [*steps[: -self.keep], *(path for path in best if path not in needed)]:
            path.unlink(missing_ok=True)

    def _forget_after(self, step: int) -> None:
        for path in [*self._all("step"), *self._all("best")]:
            if _step(path) > step:
                path.unlink()


def _step(path: Path) -> int:
    return int(path.stem.partition("-")[2])
