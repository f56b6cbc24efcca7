"""The pieces of ten photographs: how many, the same each time, none twice; what is missing is one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "dataset_setup_scripts/photographs.py"


def run(root: Path, *before: str) -> subprocess.CompletedProcess[str]:
    lines = ["import runpy, sys", *before, f"sys.argv = ['photographs.py', '--root', {str(root)!r}]"]
    code = "; ".join([*lines, f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_ten_classes_of_pieces_that_differ(tmp_path: Path) -> None:
    done = run(tmp_path / "once")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("450 pieces of ten photographs")
    found = contents(tmp_path / "once/photographs")
    for split, count in (("train", 15), ("val", 5), ("test", 25)):
        classes = [name.split("/")[1] for name in found if name.startswith(f"{split}/")]
        assert len(set(classes)) == 10 and all(classes.count(name) == count for name in classes)
    assert len(set(found.values())) == 450
    with Image.open(tmp_path / "once/photographs/train/cat/00.png") as piece:
        assert (piece.size, piece.mode) == ((48, 48), "RGB") and len(piece.getcolors(48 * 48)) > 100
    run(tmp_path / "twice")
    assert contents(tmp_path / "twice/photographs") == found


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ("sys.modules['skimage'] = None", "pip install scikit-image"),
        ("import skimage; skimage.__file__ = '/nowhere/skimage/__init__.py'", "use scikit-image 0.26.0"),
    ],
    ids=["no package", "no picture"],
)
def test_what_is_missing_is_one_line(tmp_path: Path, before: str, words: str) -> None:
    done = run(tmp_path, before)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
