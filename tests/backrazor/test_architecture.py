"""Who may import whom in the library: each part the ones below it, and nothing of the laboratory."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "src" / "backrazor"
# From the bottom to the top. A part imports itself and what stands before it.
ORDER = ("config", "hooks", "kernels", "codecs", "functional", "nn", "rules", "nets", "report", "convert")
FOREIGN = {"razorlab", "hydra", "omegaconf", "torchvision", "train", "scripts", "tests"}


def files(part: str) -> list[Path]:
    folder = ROOT / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [ROOT / f"{part}.py"]


def imported(file: Path) -> set[str]:
    """Dotted absolute names of what a file imports, wherever in it: ``backrazor.codecs.pruned``, ``torch``."""
    package = ("backrazor", *file.relative_to(ROOT).parent.parts)
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            start = ".".join(filter(None, (base, node.module)))
            names |= {start, *(f"{start}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("part", ORDER)
def test_a_part_imports_what_stands_below_it(part: str) -> None:
    above = {f"backrazor.{name}" for name in ORDER[ORDER.index(part) + 1 :]}
    for file in files(part):
        parts = {".".join(name.split(".")[:2]) for name in imported(file)}
        assert not parts & above, f"{file} imports {parts & above}"


def test_the_library_knows_nothing_of_the_laboratory() -> None:
    for file in ROOT.rglob("*.py"):
        tops = {name.partition(".")[0] for name in imported(file)}
        assert not tops & FOREIGN, f"{file} imports {tops & FOREIGN}"


def test_integrations_stand_on_top_and_each_knows_one_framework() -> None:
    frameworks = {"transformers", "lightning", "accelerate"}
    for file in ROOT.rglob("*.py"):
        names = imported(file)
        own = file.stem if file.parent.name == "integrations" else file.stem.removesuffix("_layers")
        assert {name.partition(".")[0] for name in names} & frameworks <= {own}, file
        if file.parent.name != "integrations":
            assert not any(name.startswith("backrazor.integrations") for name in names), file


def test_rules_are_functions_of_model_and_configuration() -> None:
    """They change no module: what does is not imported."""
    (file,) = files("rules")
    verbs = {"attach", "detach", "link_chains", "unlink"}
    assert not {name.rpartition(".")[2] for name in imported(file)} & verbs


def test_memory_sees_codecs_and_no_layers() -> None:
    for file in files("memory"):
        parts = {".".join(name.split(".")[:2]) for name in imported(file) if name.startswith("backrazor.")}
        assert parts <= {"backrazor.memory", "backrazor.codecs", "backrazor.hooks"}, file
