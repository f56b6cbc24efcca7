"""The counts behind docs/kernels.md, and the benchmark's answer where there is no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backrazor import kernels
from scripts.kernel_tables import GPUS, Traffic, kernel_traffic, traffic_of

ROOT = Path(__file__).resolve().parents[2]
N = 1 << 20


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (torch.float32, "int8", 16.4 + 0.61),
        (torch.bfloat16, "int8", 6.2 + 0.41),
        (torch.float32, "float32", 16 + 0.1 * 5 + 0.0044),
    ],
    ids=str,
)
def test_bytes_of_a_pack_are_those_of_the_docs(dtype: torch.dtype, values: str, expected: float) -> None:
    inputs = torch.randn(1, N).to(dtype), N // 10, values, "tile", torch.zeros(1, dtype=torch.int32)
    moved, launches = kernel_traffic("topk_pack", inputs, kernels.topk_pack(*inputs))
    assert moved / N == pytest.approx(expected, abs=0.011)
    assert launches == {torch.float32: 5, torch.bfloat16: 4}[dtype] + (values == "int8")


def test_bytes_of_an_unpack_are_those_of_the_docs() -> None:
    packed = kernels.topk_pack(torch.randn(1, N), N // 10, "int8", "tile", torch.zeros(1, dtype=torch.int32))
    inputs = *packed, N, "tile", torch.float32
    moved, launches = kernel_traffic("topk_unpack", inputs, kernels.topk_unpack(*inputs))
    assert moved / N == pytest.approx(4.21, abs=0.011)
    assert launches == 2


def test_operations_of_a_product_are_counted() -> None:
    with Traffic() as traffic:
        torch.randn(64, 32) @ torch.randn(32, 16)
    (row,) = (row for row in traffic.rows if "mm" in row[0])
    assert row[1:] == (2 * 64 * 32 * 16, 4 * (64 * 32 + 32 * 16 + 64 * 16), 1, True)


@pytest.mark.slow
def test_a_step_needs_no_device() -> None:
    traffic = traffic_of("proxylessnas", 2, torch.float32, None)
    slow, fast = (traffic.seconds(gpu) for gpu in GPUS[:2])
    assert slow > fast > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpu_benchmark_says_that_there_is_no_gpu() -> None:
    command = [sys.executable, "scripts/benchmark_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": "src"})
    assert done.returncode == 2
    assert done.stderr.strip() == "benchmark_gpu.py: no CUDA device: use scripts/benchmark.py for the CPU"
