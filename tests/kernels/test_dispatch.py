"""Which implementation runs, and what a wrong BACKRAZOR_KERNELS says. In fresh processes: the choice is made once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from backrazor import kernels
from backrazor.kernels import cuda_target, dispatch
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
    "triton": {("float32", "cpu"): "cpu", ("float64", "cpu"): "reference", ("float32", "meta"): "reference"},
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
        (
            "interpret",
            "meta",
            "BACKRAZOR_KERNELS='interpret' runs on cpu tensors, not on meta: unset it or move the model",
        ),
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


FORCED_TRITON = """
import torch
import backrazor as br
model = torch.nn.Sequential(torch.nn.Linear(9, 8), torch.nn.LayerNorm(8), torch.nn.GELU())
br.razor_(model)
model(torch.randn(3, 9)).sum().backward()
print(br.memory.predict(model, (9,), 3).saved_bytes > 0)
"""


def test_triton_by_name_leaves_models_on_the_cpu_alone() -> None:
    done = run(FORCED_TRITON, "triton")
    assert done.stdout.strip() == "True", done.stderr


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """Nothing of what was found out before, nor of what this test finds."""
    caches = dispatch._runs, dispatch._other_device, dispatch.forced
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def on(device: str) -> torch.Tensor:
    """A tensor that says it lies on ``device``, which need not exist."""
    with FakeTensorMode():
        return torch.empty(4, device=device)


def test_rocm_takes_the_reference_with_one_warning(fresh_choice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BACKRAZOR_KERNELS", raising=False)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.warns(RuntimeWarning, match=r"plain PyTorch: they are for NVIDIA GPUs, .* built for ROCm 6.4") as told:
        assert implementation("topk", on("cuda")) is None
        assert implementation("bitmask", on("cuda")) is None
    assert len(told) == 1


def test_rocm_refuses_triton_by_name_in_one_line(fresh_choice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKRAZOR_KERNELS", "triton")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ValueError, match=r"BACKRAZOR_KERNELS='triton' cannot run: .*ROCm 6.4; or unset it"):
        implementation("topk", on("cuda"))


@pytest.mark.parametrize("device", ["xpu", "mps"])
def test_other_accelerators_take_the_reference_with_one_warning(device: str, fresh_choice: None) -> None:
    with pytest.warns(RuntimeWarning, match=f"there are none for the device {device}") as told:
        assert implementation("topk", SimpleNamespace(device=torch.device(device), dtype=torch.float32)) is None
        assert implementation("topk", SimpleNamespace(device=torch.device(device), dtype=torch.float32)) is None
    assert len(told) == 1


@pytest.mark.parametrize("key", ["CPU", "CUDA", "XPU", "MPS", "HPU", "PrivateUse1"])
def test_operators_run_on_every_device(key: str) -> None:
    for name in kernels.__all__:
        if isinstance(getattr(kernels, name), torch._ops.OpOverload):
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"backrazor::{name}", key), name


LAUNCH = """
import sys, sysconfig
import torch
import triton.runtime
from triton.runtime.build import compile_module_from_src
{preparation}
# Triton's own driver builds such a module before the first launch, if it finds a GPU
source = "#include <Python.h>\\nvoid launcher(void) {{}}"
sys.modules["triton.runtime.driver"]._create_driver = lambda: compile_module_from_src(source, "launcher")
from backrazor.kernels.bitmask.triton import encode
encode(torch.zeros(3, 50), 0.0, 6.0)
"""
NO_HEADERS = "sysconfig.get_paths = lambda *_, **__: {'include': '/nowhere'}"
TOOLS = {  # environment, preparation, what is named
    "no compiler": ({"PATH": "/nowhere"}, "", "a C compiler (gcc or clang, or CC)"),
    "a wrong CC": ({"CC": "/nowhere/cc"}, "", "the C compiler CC=/nowhere/cc"),
    "no headers": ({}, NO_HEADERS, "/nowhere/Python.h (Python's development files)"),
    "neither": (
        {"PATH": "/nowhere"},
        NO_HEADERS,
        "a C compiler (gcc or clang, or CC) and /nowhere/Python.h (Python's development files)",
    ),
}


@pytest.mark.parametrize("name", TOOLS)
def test_what_triton_builds_with_is_named_where_it_is_missing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment, preparation, missing = TOOLS[name]
    monkeypatch.delenv("CC", raising=False)
    for key, value in (environment | {"TRITON_CACHE_DIR": str(tmp_path)}).items():
        monkeypatch.setenv(key, value)
    done = run(LAUNCH.format(preparation=preparation), None)
    wanted = (
        f"RuntimeError: Triton needs {missing} to launch its first CUDA kernel: install it, or set "
        "BACKRAZOR_KERNELS=reference"
    )
    assert done.stderr.strip().splitlines()[-1] == wanted, done.stderr


def test_other_failures_of_a_launch_are_told_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_target, "missing_build_tools", lambda: ["a C compiler"])
    assert cuda_target.build_failure(RuntimeError("CUDA error: out of memory")) is None
    assert "reference" in cuda_target.build_failure(FileNotFoundError("gcc"))
