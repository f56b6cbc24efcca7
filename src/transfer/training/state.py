"""What a run needs to go on: saved atomically after an epoch, read back without unpickling objects."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transfer.errors import UserError

FORMAT = 1


def random_state() -> dict[str, Any]:
    """Return the state of every random generator that training draws from, in types that load without pickle."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, spare = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), spare],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Undo ``random_state``."""
    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, spare = state["python"]
    random.setstate((version, tuple(internal), spare))
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def save_state(path: Path, state: dict[str, Any], config_hash: str) -> None:
    """Write ``state`` to ``path``: whole or not at all, whenever the process dies."""
    partial = path.with_name(path.name + ".part")
    with partial.open("wb") as file:
        torch.save({"format": FORMAT, "config_hash": config_hash, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_state(path: Path, config_hash: str) -> dict[str, Any] | None:
    """Return what ``save_state`` wrote; None where there is no file.

    Raises:
        UserError: the file is damaged, of another format, or belongs to another configuration.
    """
    if not path.is_file():
        return None
    advice = "trainer.resume=never starts the run over"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"trainer.resume=auto: {path} is damaged ({type(error).__name__}); {advice}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"trainer.resume=auto: {path} is no checkpoint of format {FORMAT}; {advice}")
    if state["config_hash"] != config_hash:
        raise UserError(
            f"trainer.resume=auto: {path} belongs to configuration {state['config_hash']}, this is "
            f"{config_hash}; {advice}"
        )
    return state
