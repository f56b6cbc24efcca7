"""Who may import whom in the laboratory."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = {  # folder or file below src/razorlab: top-level packages it must not import
    "data": {"backrazor", "hydra", "omegaconf"},
    "models": {"backrazor", "hydra", "omegaconf"},
    "training": {"hydra", "omegaconf"},
    "tables": {"backrazor", "hydra", "omegaconf", "torch", "torchvision", "timm"},
    "records.py": {"backrazor", "hydra", "omegaconf", "torch", "torchvision", "timm"},
    "help.py": {"backrazor", "hydra", "omegaconf", "torch"},
    "schema.py": {"hydra", "omegaconf", "torch"},
    "settings.py": {"hydra", "omegaconf", "torch"},
    "errors.py": {"backrazor", "hydra", "omegaconf", "torch"},
}


def imported(file: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("part", FORBIDDEN)
def test_import_rights(part: str) -> None:
    place = ROOT / "src" / "razorlab" / part
    files = [place] if place.suffix else sorted(place.rglob("*.py"))
    assert files
    for file in files:
        names = imported(file)
        assert not {name.partition(".")[0] for name in names} & (FORBIDDEN[part] | {"train", "scripts", "tests"}), file
        if part in ("tables", "data", "models"):
            assert not {name for name in names if name.startswith("razorlab.training")}, file


def test_source_files_stay_readable() -> None:
    for file in [ROOT / "train.py", *(ROOT / "src" / "razorlab").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]:
        assert len(file.read_text().splitlines()) <= 320, f"{file} grew too long: split it"
