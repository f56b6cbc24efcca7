"""mypy knows the schema: a misspelt key, a wrong type and a word that a key does not take are errors of its."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from razorlab.settings import BY_PATH, defaults

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = {"config", *defaults()} - {"seed"}  # what parameters are called that hold one
LINES = {  # what a function does with a configuration: what mypy says of it
    'config["optim"]["lr"] * 2': None,
    'config["trainer"]["measure"]["mode"] == "saved"': None,
    'config["optim"]["rate"]': 'TypedDict "Optim" has no key "rate"',
    'config["optimiser"]["lr"]': 'TypedDict "Config" has no key "optimiser"',
    'config["data"]["image_size"].upper()': '"int" has no attribute "upper"',
    'config["trainer"]["steps"] + 1': 'Unsupported operand types for + ("None" and "int")',
    'config["data"]["protocol"] == "offical"': "Non-overlapping equality check",
    'torch_threads(config["paths"]["data"])': 'has incompatible type "str"; expected "int | None"',
}
SNIPPET = """from razorlab.schema import Config

def torch_threads(number: int | None) -> None: ...

def read(config: Config) -> None:
"""


def test_mypy_finds_what_the_schema_does_not_have(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    file = tmp_path / "reads.py"
    file.write_text(SNIPPET + "".join(f"    {line}\n" for line in LINES))
    options = ("--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(tmp_path), "--follow-imports", "skip")
    said, trouble, _ = api.run([*options, str(file), str(ROOT / "src" / "razorlab" / "schema.py")])
    found = {int(number): text for number, text in re.findall(r"reads\.py:(\d+): error: (.*)", said)}
    first = len(SNIPPET.splitlines()) + 1
    for number, (line, expected) in enumerate(LINES.items(), first):
        assert (number in found) == (expected is not None), (line, said, trouble)
        assert expected is None or expected in found[number], (line, found[number])


def test_whoever_reads_a_section_says_so_and_is_checked() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert "src/razorlab" in settings["files"] and settings["strict_equality"]
    ignored = {name for entry in settings["overrides"] if entry.get("ignore_errors") for name in entry["module"]}
    for file in sorted((ROOT / "src" / "razorlab").rglob("*.py")):
        module = ".".join(file.relative_to(ROOT / "src").with_suffix("").parts)
        text = file.read_text()
        if module in ignored or f"{module.rpartition('.')[0]}.*" in ignored:
            assert "razorlab import schema" not in text, f"mypy is told to ignore {module}, which reads a section"
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.arg) and node.arg in SECTIONS and node.annotation is not None:
                loose = ast.unparse(node.annotation) == "Mapping[str, Any]"
                assert not loose or file.name in ("records.py", "run.py", "settings.py"), f"{file}:{node.lineno}"


def test_conflicts_name_keys_of_the_schema() -> None:
    text = (ROOT / "src" / "razorlab" / "conflicts.py").read_text()
    named = set(re.findall(r'"((?:task|model|data|razor|method|optim|trainer)\.[\w.]+)"', text))
    assert named and named <= set(BY_PATH)
