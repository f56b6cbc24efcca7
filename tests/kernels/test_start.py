"""Where the CPU kernels start and where they step aside: processors, folders for machine code, warming up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llvmlite import binding

from backrazor import kernels, warmup
from backrazor.codecs.smooth import quantiser
from backrazor.kernels.cpu import kept, launch, target
from backrazor.kernels.cpu.layout import F32, KIND
from backrazor.kernels.cpu.target import missing_helpers

ROOT = Path(__file__).resolve().parents[2]
MASK = """
import torch
from backrazor import kernels
from backrazor.kernels.bitmask import reference
for _ in range(2):
    x = torch.randn(3, 50)
    assert torch.equal(kernels.mask_encode(x, 0.0, 6.0), reference.encode(x, 0.0, 6.0))
"""
COMPILER = "\nimport sys; print(bool({'numba', 'llvmlite'} & set(sys.modules)))"
EVERY_FAMILY = """
import torch
from backrazor import kernels
from backrazor.codecs.smooth import quantiser
from backrazor.kernels.cpu.target import has_avx512
from tests.kernels import test_arguments
from tests.backrazor.compare import assert_close, assert_same_bits
assert not has_avx512()
for family, run in test_arguments.FAMILIES.items():
    for name, got, wanted in run():
        compare = assert_same_bits if "convolution" not in name else lambda *given: assert_close(*given, 1e-5)
        compare(name, got, wanted)
x, (thresholds, levels) = test_arguments.X, quantiser("gelu", 4)
codes = kernels.level_encode(x, thresholds, 4)
assert_same_bits("4 bits", codes, test_arguments.derivative_reference.encode(x, thresholds, 4))
"""
AVX2 = "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+popcnt"


def run(code: str, **settings: str) -> subprocess.CompletedProcess:
    """In a fresh process with no home and no warnings but those asked for."""
    kept = {"PATH", "LD_LIBRARY_PATH"}
    environment = {name: value for name, value in os.environ.items() if name in kept}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"} | settings
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_compiling_is_told_once_and_kept_for_other_processes(tmp_path: Path) -> None:
    first = run(MASK, BACKRAZOR_CACHE_DIR=str(tmp_path / "kept"))
    assert first.returncode == 0, first.stderr
    (line,) = first.stderr.splitlines()
    assert line.startswith("backrazor: compiling kernels for this processor, kept in") and str(tmp_path) in line
    (file,) = (file for file in (tmp_path / "kept").rglob("*") if file.is_file())
    assert f"bitmask__cpu_masks_encode_worker_{F32}" in file.name
    changed, whole = file.stat().st_mtime_ns, file.read_bytes()
    second = run(MASK + COMPILER, BACKRAZOR_CACHE_DIR=str(tmp_path / "kept"))
    assert (second.returncode, second.stderr, second.stdout) == (0, "", "False\n"), "neither Numba nor LLVM is loaded"
    assert file.stat().st_mtime_ns == changed
    file.write_bytes(whole[:-100])
    third = run(MASK + COMPILER, BACKRAZOR_CACHE_DIR=str(tmp_path / "kept"))
    assert third.returncode == 0 and third.stderr.startswith("backrazor: compiling") and third.stdout == "True\n"
    assert len(file.read_bytes()) == len(whole), "what was damaged is replaced"


def test_nothing_can_be_written_and_there_is_no_home(tmp_path: Path) -> None:
    """A file stands where the folder would be: that stops the superuser, too."""
    (tmp_path / "file").touch()
    done = run(MASK, BACKRAZOR_CACHE_DIR=str(tmp_path / "file" / "folder"))
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert "for this process alone" in line and "BACKRAZOR_CACHE_DIR names another folder" in line


def test_a_home_that_nobody_knows_is_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BACKRAZOR_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert not kept.is_writable(kept.cache_folder())
    assert not Path("~").exists()


def test_machine_code_belongs_to_the_state_of_the_cpu_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that is inlined changes what is kept. The code of other devices is no reason to compile anew."""
    copy = tmp_path / "kernels"
    shutil.copytree(kept.KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(kept, "KERNELS", copy)
    states = [kept.source_digest.__wrapped__()]
    for name in ("topk/triton.py", "topk/_triton_pack.py", "topk/ops.py", "topk/reference.py", "_triton.py"):
        with open(copy / name, "a") as file:
            file.write("# a comment\n")
        assert kept.source_digest.__wrapped__() == states[0], name
    for name in ("cpu/lanes.py", "topk/_cpu_select.py", "topk/layout.py", "bitmask/cpu.py", "bitmask/_cpu_masks.py"):
        with open(copy / name, "a") as file:
            file.write("# a comment\n")
        states.append(kept.source_digest.__wrapped__())
    assert len(set(states)) == len(states)
    assert not [file for file in kept.KERNELS.rglob("*.py") if "cache=True" in file.read_text()]


def test_a_processor_without_float16_takes_the_reference_with_one_warning() -> None:
    done = run(MASK, NUMBA_CPU_NAME="nehalem", NUMBA_CPU_FEATURES="")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1 and "F16C" in done.stderr
    forced = run(MASK, NUMBA_CPU_NAME="nehalem", NUMBA_CPU_FEATURES="", BACKRAZOR_KERNELS="numba")
    assert forced.returncode == 1
    assert forced.stderr.strip().splitlines()[-1].startswith("ValueError: BACKRAZOR_KERNELS='numba' cannot run: ")


TRAIN = """
import gc, ctypes, sys
import torch
from torch import nn
from backrazor.memory.meters import resident_bytes

def settled():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes()

def step(x):
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU6(), nn.Flatten(1), nn.Linear(576, 64), nn.LayerNorm(64), nn.GELU(),
    nn.Linear(64, 64)
).eval()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    step(torch.randn(4, 3, 8, 8))
before = settled()
import backrazor as br
br.razor_(model, br.RazorConfig.compact(0.9))
step(torch.randn(4, 3, 8, 8))
print([name for name in ("numba", "llvmlite") if name in sys.modules], settled() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="elsewhere LLVM loads the code")
def test_a_razored_step_on_kept_kernels_loads_no_compiler(tmp_path: Path) -> None:
    assert run(TRAIN, BACKRAZOR_CACHE_DIR=str(tmp_path)).stdout.startswith("['numba', 'llvmlite'] ")
    done = run(TRAIN, BACKRAZOR_CACHE_DIR=str(tmp_path))
    loaded, _, taken = done.stdout.rpartition(" ")
    assert loaded == "[]", done.stderr
    assert 0 < int(taken) < 15e6, "the library, its kernels and a step's small tensors"


def test_numba_that_does_not_start_leaves_the_reference_with_one_warning(tmp_path: Path) -> None:
    """What it stands on is part of the name of what is kept, so that other versions are asked anew."""
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs another NumPy')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + MASK
    done = run(code, BACKRAZOR_CACHE_DIR=str(tmp_path / "kept"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1 and "Numba needs another NumPy" in done.stderr


def test_kept_code_belongs_to_the_versions_and_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [kept.file_of("worker")]
    for package in ("numba", "llvmlite", "numpy"):
        with monkeypatch.context() as patched:
            versions = {name: kept.version(name) for name in ("numba", "llvmlite", "numpy")} | {package: "0"}
            patched.setattr(kept, "version", versions.__getitem__)
            patched.setattr(kept, "_maker", kept._maker.__wrapped__)
            names.append(kept.file_of("worker"))
    monkeypatch.setattr(kept, "processor", lambda: "another")
    monkeypatch.setattr(kept, "_maker", kept._maker.__wrapped__)
    names.append(kept.file_of("worker"))
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("told", ["NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX", ".numba_config.yaml"])
def test_a_processor_that_numba_is_told_is_the_one_that_counts(
    told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    described = target._described.__wrapped__
    if described() is None:
        pytest.skip("this system does not describe its processor")
    assert target.has_avx512.__wrapped__() == ("+avx512f" in target.target()[2].split(","))
    (tmp_path / told).touch() if told.startswith(".") else monkeypatch.setenv(told, "")
    assert described() is None


@pytest.mark.slow
def test_a_processor_with_avx2_and_without_avx512_gives_the_same_bits(tmp_path: Path) -> None:
    host = binding.get_host_cpu_features()
    if not all(host.get(name.lstrip("+")) for name in AVX2.split(",")):
        pytest.skip("this processor has no AVX2")
    if not host.get("avx512f"):
        pytest.skip("this processor has no AVX-512: what the other tests run is what this one would")
    settings = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": AVX2, "BACKRAZOR_CACHE_DIR": str(tmp_path)}
    done = run(EVERY_FAMILY, **settings)
    assert done.returncode == 0, done.stderr


def machine_of(triple: str, cpu: str, features: str) -> binding.TargetMachine:
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    return binding.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=3)


TARGETS = {  # triple, processor, features: whether it has instructions for float16
    "aarch64": (("aarch64-unknown-linux-gnu", "generic", ""), True),
    "AVX2": (("x86_64-unknown-linux-gnu", "haswell", ""), True),
    "AVX-512": (("x86_64-unknown-linux-gnu", "skylake-avx512", ""), True),
    "SSE": (("x86_64-unknown-linux-gnu", "nehalem", ""), False),
}


@pytest.mark.parametrize("name", TARGETS)
def test_the_probe_knows_who_converts_float16(name: str) -> None:
    machine, whole = TARGETS[name]
    assert (missing_helpers(machine_of(*machine)) == []) is whole


OTHERS = """
import re
from llvmlite import binding
from backrazor import warmup
from backrazor.kernels.cpu import compiling
from backrazor.kernels.cpu.entries import name_of
from backrazor.kernels.cpu.layout import F16
from backrazor.kernels.derivative import _cpu_lanes
from tests.kernels.test_start import TARGETS, machine_of

_cpu_lanes.has_avx512 = lambda: False
machines = {name: machine_of(*TARGETS[name][0]) for name in ("aarch64", "AVX2")}
points = [point for point in warmup.entry_points() if not point[2] or point[2][0] == F16]
assert len({point[0] for point in points}) == 14
for worker, block, settings in points:
    _, code = compiling.compiled(worker.function(), block, settings, name_of(worker, settings))
    code = re.sub(r'"(?:target-cpu|target-features|tune-cpu)"="[^"]*"', "", code)
    for name, machine in machines.items():
        module = binding.parse_assembly(code)
        module.triple, module.data_layout = machine.triple, str(machine.target_data)
        made = machine.emit_assembly(module)
        assert "ret" in made and not re.search(r"__(?:extend|trunc)\\w*hf", made), f"{worker.name} on {name}"
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_other_processors() -> None:
    """LLVM makes machine code of each worker for aarch64 and for AVX2, and calls nothing that a process lacks.

    In a process of its own: what Numba has compiled before for a processor with AVX-512 would be taken again, and LLVM
    ends the process where it meets such an instruction on the way to another one.
    """
    done = run(OTHERS)
    assert done.returncode == 0, done.stderr


def test_the_list_for_warming_up_is_what_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = set()
    real = launch.entry_point
    monkeypatch.setattr(launch, "entry_point", lambda *point: launched.add(point) or real(*point))
    for dtype in KIND:
        x = torch.randn(2, 9 * 16).to(dtype)
        packed = kernels.topk_pack(x, 20, "int8", "bitmap", torch.zeros(1, dtype=torch.int32))
        kernels.topk_unpack(*packed, 144, "bitmap", dtype)
        for rows in (9, 16):  # of 16 elements and of nine
            flag = torch.zeros(1, dtype=torch.int32)
            guessed = kernels.guess_pack(x, 20, "int8", "bitmap", rows, False, 0.0, 6.0, None, None, flag)
            kernels.guess_unpack(*guessed, None, None, 144, False, "bitmap", dtype)
        kernels.mask_apply(x, kernels.mask_encode(x, 0.0, 6.0))
        for bits in (2, 4, 8):
            thresholds, levels = quantiser("gelu", bits)
            kernels.level_apply(x, kernels.level_encode(x, thresholds, bits), levels, bits)
        for bits in (4, 8):
            codes, scales = kernels.row_encode(x, torch.zeros(2), torch.ones(2), bits)
            kernels.row_decode(codes, scales, 144, bits, dtype)
        for depthwise in (False, True):
            window = kernels.Window((4, 6, 6), (3, 3), (1, 1), (1, 1), (1, 1), depthwise)
            sums = torch.zeros(kernels.product_sums_shape(window, 4))
            masked = () if depthwise else (kernels.mask_encode(torch.randn(2, 144), 0.0, 6.0), torch.rand(2, 4))
            kernels.add_conv_product(sums, torch.randn(2, 4, 6, 6).to(dtype), *packed, "bitmap", *window, *masked)
    assert launched == set(warmup.entry_points())


def test_warming_up_fills_the_folder(tmp_path: Path) -> None:
    code = "from backrazor import warmup; warmup.entry_points = lambda: points; import sys\n"
    code += "from backrazor.kernels.bitmask import cpu; points = [*cpu.entry_points()]\n"
    code += "sys.exit(warmup.main(['--types', 'float32']))"
    done = run(code, BACKRAZOR_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0 and done.stdout.startswith(f"2 kernels are ready in {tmp_path} ("), done.stderr
    after = run(MASK, BACKRAZOR_CACHE_DIR=str(tmp_path))
    assert (after.returncode, after.stderr) == (0, "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": ""}, "nothing to compile, since the processor has no"),
        ({"BACKRAZOR_CACHE_DIR": "/dev/null/folder"}, "/dev/null/folder is not writable: set BACKRAZOR_CACHE_DIR"),
    ],
)
def test_warming_up_says_why_it_cannot(settings: dict[str, str], message: str) -> None:
    done = run("import sys; from backrazor import warmup; sys.exit(warmup.main([]))", **settings)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and message in done.stderr
