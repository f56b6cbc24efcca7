"""The wheel installs and works outside the repository, with what it needs and nothing more."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import pathlib, sys
import torch
import backrazor as br
assert pathlib.Path(br.__file__).is_relative_to(sys.argv[1]), br.__file__
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 10))
print(br.razor_(model, br.RazorConfig(sparsity=0.9)))
with br.memory.ledger(model) as ledger:
    loss = model(torch.randn(8, 64)).sum()
loss.backward()
assert ledger.total_bytes == br.memory.predict(model, (64,), 8, loss_fn=torch.sum).saved_bytes > 0
assert not {"hydra", "torchvision", "timm", "razorlab", "transformers", "lightning"} & set(sys.modules)
import backrazor.integrations.figures
assert not {"transformers", "lightning"} & set(sys.modules)
from razorlab.report import write_report
from importlib import resources
assert "<!doctype html>" in resources.files("razorlab.report").joinpath("page.html").read_text()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since building leaves files beside the sources."""
    pytest.importorskip("setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(out), str(source)], check=True)
    (built,) = out.glob("backrazor-*.whl")
    return built


def test_it_works_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "error", str(program), str(target)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "2 x Linear" in run.stdout


def test_it_holds_both_packages_their_types_and_the_licence_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"backrazor", "razorlab"}
    assert "backrazor/py.typed" in names and any(name.endswith("LICENSE") for name in names)
    assert "backrazor/kernels/topk/cpu.py" in names and "razorlab/report/page.html" in names
    files = {file.relative_to(ROOT).as_posix() for file in (ROOT / "configs").rglob("*") if file.is_file()}
    assert {f"razorlab/{file}" for file in files} <= set(names)
