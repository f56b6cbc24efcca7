"""Shared by the laboratory's tests: composing configurations, running the command line in this process, image trees."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from razorlab.commands import train
from razorlab.composition import compose_config

# A real network of 0.3 M parameters over real digits, small enough that a run takes a second.
TINY = (
    "model=timm",
    "model.name=test_efficientnet",
    "model.pretrained=false",
    "razor=none",
    "data.image_size=32",
    "data.val_fraction=0.05",
    "data.test_fraction=0.05",
    "trainer.measure.mode=none",
    "trainer.progress=false",
)


def compose_plain(*overrides: str) -> dict[str, Any]:
    """Compose the configuration as train.py does and return plain values."""
    return compose_config(overrides)


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Run train.py in this process, inside an empty folder: ``command("model=..") -> (exit code, stderr lines)``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def run(*arguments: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        code = train.main(list(arguments))
        return code, capsys.readouterr().err.splitlines()

    return run


@pytest.fixture(autouse=True)
def _one_thread_and_torch_settings_restored() -> Iterator[None]:
    """Networks this small run faster on one thread than on two that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def write_image(path: Path, mode: str = "RGB", side: int = 16, seed: int = 0) -> Path:
    """Write a random image of any Pillow mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 4), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


def write_tree(root: Path, classes: int = 2, images: int = 10) -> Path:
    """Write ``root/<class>/<n>.png``."""
    for label in range(classes):
        for index in range(images):
            write_image(root / f"class{label}" / f"{index}.png", seed=label * images + index)
    return root


def files_below(folder: Path) -> list[str]:
    """Every file below ``folder``, as text."""
    return sorted(os.path.relpath(path, folder) for path in folder.rglob("*") if path.is_file())
