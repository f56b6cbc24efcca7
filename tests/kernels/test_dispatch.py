"""Which implementation runs, and what a wrong BACKRAZOR_KERNELS says. In fresh processes: the choice is made once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backrazor.kernels.dispatch import implementation

ROOT = Path(__file__).resolve().parents[2]
USE = """
import torch
from backrazor.kernels.dispatch import implementation
module = implementation("bitmask", torch.zeros(1, dtype={dtype}, device={device!r}))
print(module.__name__ if module else "reference")
"""
NO_TRITON = """
import importlib.abc, importlib.machinery, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else found(name, package)
sys.meta_path.insert(0, Missing())
import torch
import backrazor as br
model = br.razor_(torch.nn.Sequential(torch.nn.Linear(9, 4), torch.nn.ReLU())) and None
"""


def run(code: str, choice: str | None) -> subprocess.CompletedProcess:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("BACKRAZOR_KERNELS", "TRITON_INTERPRET")
    }
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    if choice is not None:
        environment["BACKRAZOR_KERNELS"] = choice
    # PyTorch before 2.7 leaves a temporary folder to the end of the process
    command = [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


CHOICES = {  # by BACKRAZOR_KERNELS: what runs for a type on a device
    None: {("float32", "cpu"): "cpu", ("float64", "cpu"): "reference", ("float32", "meta"): "reference"},
    "": {("bfloat16", "cpu"): "cpu"},
    "numba": {("float16", "cpu"): "cpu", ("float64", "cpu"): "reference"},
    "reference": {("float32", "cpu"): "reference", ("float32", "meta"): "reference"},
    "interpret": {("float32", "cpu"): "triton", ("float64", "cpu"): "reference"},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_choice(choice: str | None) -> None:
    lines = [USE.format(dtype=f"torch.{dtype}", device=device) for dtype, device in CHOICES[choice]]
    done = run("".join(lines), choice)
    found = [line.removeprefix("backrazor.kernels.bitmask.") for line in done.stdout.split()]
    assert found == list(CHOICES[choice].values()), done.stderr


@pytest.mark.parametrize(
    ("choice", "device", "message"),
    [
        (
            "cuda",
            "cpu",
            "BACKRAZOR_KERNELS='cuda' is not known: unset it or use one of reference, numba, triton, interpret",
        ),
        ("triton", "cpu", "BACKRAZOR_KERNELS='triton' runs on cuda tensors, not on cpu: unset it or move the model"),
        ("numba", "meta", "BACKRAZOR_KERNELS='numba' runs on cpu tensors, not on meta: unset it or move the model"),
    ],
)
def test_a_wrong_choice_is_one_clear_line(choice: str, device: str, message: str) -> None:
    done = run(USE.format(dtype="torch.float32", device=device), choice)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == f"ValueError: {message}"


def test_interpret_after_triton_is_refused() -> None:
    code = "import os, triton; os.environ['BACKRAZOR_KERNELS'] = 'interpret'\n" + USE.format(
        dtype="torch.float32", device="cpu"
    )
    done = run(code, None)
    assert "set it before Python starts" in done.stderr.strip().splitlines()[-1]


def test_everything_but_cuda_works_where_triton_is_missing() -> None:
    code = NO_TRITON + USE.format(dtype="torch.float32", device="cpu") + "assert 'triton' not in sys.modules\n"
    done = run(code, None)
    assert done.stdout.strip() == "backrazor.kernels.bitmask.cpu", done.stderr


def test_forcing_triton_where_it_is_missing_says_so() -> None:
    done = run(NO_TRITON + USE.format(dtype="torch.float32", device="cpu"), "triton")
    wanted = "ValueError: BACKRAZOR_KERNELS='triton' needs the package triton, which is missing: install it or unset it"
    assert done.stderr.strip().splitlines()[-1] == wanted


def test_import_is_lean() -> None:
    code = (
        "import sys, backrazor; print(sorted({'triton', 'numba', 'timm', 'torchvision', 'hydra'} & set(sys.modules)))"
    )
    done = run(code, None)
    assert "numba" not in done.stdout and "triton" not in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("family", ["layernorm", "softmax"])
def test_a_family_without_a_cpu_version_takes_the_reference(family: str) -> None:
    assert implementation(family, torch.zeros(1)) is None
