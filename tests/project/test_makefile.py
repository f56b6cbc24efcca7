"""The Makefile makes an environment, also where one was begun and broke off."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_an_environment_without_pip_gets_it(tmp_path: Path) -> None:
    """Debian's Python without its package ``python3-venv`` leaves one behind, and so does Control-C."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("requirements.txt", "requirements-dev.txt", "pyproject.toml"):
        (folder / name).touch()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    # What the first rule of an installation needs, and no more: nothing is downloaded.
    needed = subprocess.run(
        ["make", "--dry-run", ".venv/.installed"], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    created = [line for line in needed if line.endswith("-m venv .venv")]
    assert len(created) == 1
    subprocess.run(["make", ".venv/bin/pip", f"PYTHON={sys.executable}"], cwd=folder, check=True)
    subprocess.run([folder / ".venv/bin/python", "-m", "pip", "--version"], check=True)
