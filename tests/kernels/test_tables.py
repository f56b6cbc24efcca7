"""The counts behind docs/kernels.md, and the benchmark's answer where there is no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import backrazor as br
from backrazor import kernels
from razorlab import binaries
from razorlab.launches import Launches
from scripts.kernel_tables import GPUS, Traffic, kernel_bytes, traffic_of

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
    moved = kernel_bytes("topk_pack", inputs, kernels.topk_pack(*inputs))
    assert moved / N == pytest.approx(expected, abs=0.011)
    launches = {torch.float32: 6, torch.bfloat16: 5}[dtype] + (values == "int8")  # one clears the counters
    assert Launches().of_operator(kernels.topk_pack, inputs, {}) == launches


def test_bytes_of_an_unpack_are_those_of_the_docs() -> None:
    packed = kernels.topk_pack(torch.randn(1, N), N // 10, "int8", "tile", torch.zeros(1, dtype=torch.int32))
    inputs = *packed, N, "tile", torch.float32
    moved = kernel_bytes("topk_unpack", inputs, kernels.topk_unpack(*inputs))
    assert moved / N == pytest.approx(4.21, abs=0.011)
    assert Launches().of_operator(kernels.topk_unpack, inputs, {}) == 1


def test_operations_of_a_product_are_counted() -> None:
    with Traffic() as traffic:
        torch.randn(64, 32) @ torch.randn(32, 16)
    (row,) = (row for row in traffic.rows if "mm" in row[0])
    assert row[1:5] == (2 * 64 * 32 * 16, 4 * (64 * 32 + 32 * 16 + 64 * 16), 1, True)


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
                                                                           /* 0x000e300000000800 */
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;                 /* 0x0000000000057919 */
        /*0020*/              @!P2 BRA 0x20 ;                              /* 0x0000000000057919 */
        /*0030*/                   IADD3 R3, R3, 0x1, RZ ;                 /* 0x0000000000057919 */
        /*0040*/               @P1 BRA 0x10 ;                              /* 0x0000000000057919 */
        /*0050*/               @P0 BRA 0x70 ;                              /* 0x0000000000057919 */
        /*0060*/                   EXIT ;                                  /* 0x0000000000057919 */
        /*0070*/                   BRA 0x70;                               /* 0x0000000000057919 */
        /*0080*/                   NOP;                                    /* 0x0000000000057919 */
"""


def test_instructions_are_counted_outside_and_inside_of_loops() -> None:
    assert binaries.count_instructions(SASS) == (4, 4)


def test_a_launch_says_how_often_its_loop_runs() -> None:
    x, flag = torch.empty(8, 602_112), torch.zeros(1, dtype=torch.int32)
    work = Launches().work_of_operator(kernels.topk_pack, (x, 60_212, "int8", "tile", flag), {})
    emit = next(launch for launch in work.launches if launch.configuration.kernel == "emit")
    assert (emit.programs, emit.passes) == (8 * 98, 3)  # chunks of 6,144 elements
    small = Launches().work_of_operator(kernels.topk_pack, (x[:, :5000], 500, "float32", "tile", flag), {})
    assert [(launch.programs, launch.passes) for launch in small.launches] == [(8, 3)]


MOST_LAUNCHES = {  # of forward and backward; the dense steps have 380, 408 and 406
    ("vit_b16", 128, torch.bfloat16): 1500,
    ("proxylessnas", 8, torch.bfloat16): 820,
    ("proxylessnas", 8, torch.float32): 820,
}


@pytest.mark.slow
@pytest.mark.parametrize("step", MOST_LAUNCHES, ids=str)
def test_launches_of_a_step(step: tuple[str, int, torch.dtype]) -> None:
    """What the host pays for: 11 to 18 microseconds each."""
    assert traffic_of(*step, br.RazorConfig.compact(0.9)).total <= MOST_LAUNCHES[step]


def test_one_launch_is_counted_for_what_a_kernel_does_at_once() -> None:
    """Numbers that host code makes on the CPU are no launches, nor are views and allocations."""
    x, flag = torch.empty(8, 5000), torch.zeros(1, dtype=torch.int32)
    assert Launches().of_operator(kernels.mask_encode, (x, 0.0, 6.0), {}) == 1
    assert Launches().of_operator(kernels.topk_pack, (x, 500, "float32", "tile", flag), {}) == 1
    with Launches() as counted:
        torch.zeros(3).view(3, 1).add(1)
        torch.promote_types(torch.float32, torch.bfloat16)
    assert counted.total == 2


@pytest.mark.slow
def test_a_step_needs_no_device() -> None:
    traffic = traffic_of("proxylessnas", 2, torch.float32, None)
    slow, fast = (traffic.seconds(gpu) for gpu in GPUS[:2])
    assert slow > fast > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpu_benchmark_says_that_there_is_no_gpu() -> None:
    command = [sys.executable, "-m", "razorlab", "bench-gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": "src"})
    assert done.returncode == 2
    assert done.stderr.strip() == "razorlab bench-gpu: no CUDA device: use `python -m razorlab bench` for the CPU"
