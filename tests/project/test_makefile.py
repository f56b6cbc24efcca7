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
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    venv = folder / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    interpreter = tmp_path / "an interpreter"
    interpreter.symlink_to(sys.executable)
    make = ["make", f"PYTHON={interpreter}"]
    said = subprocess.run([*make, "--dry-run", ".venv/.installed"], cwd=folder, check=True, capture_output=True)
    assert f'"{interpreter}" -m venv .venv'.encode() in said.stdout.splitlines()  # for what installs packages, too
    subprocess.run([*make, ".venv/bin/pip"], cwd=folder, check=True)
    subprocess.run([venv / "bin" / "python", "-m", "pip", "--version"], check=True)
