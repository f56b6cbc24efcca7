"""Every kernel in every configuration compiles for each GPU generation, without spills and within stated limits."""

from __future__ import annotations

import os
from importlib import import_module

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import torch
import triton
import triton.language as tl

from razorlab import ahead, binaries
from tests.kernels.addresses import narrow_products

CAPABILITIES = (80, 90, 100)
MOST_CONFIGURATIONS = 4
MOST_REGISTERS = 128  # a thread: half of what a thread can have
MOST_SHARED_BYTES = 32 << 10  # a block
LEAST_OCCUPANCY = 0.25


@pytest.fixture(scope="module")
def configurations() -> list[ahead.Configuration]:
    return ahead.configurations()


def test_every_kernel_is_in_the_list(configurations: list[ahead.Configuration]) -> None:
    """Each jitted function that a module launches, by what host code launches, not by a list of names."""
    found = {(c.family, c.kernel) for c in configurations}
    assert {family for family, _ in found} == set(ahead.FAMILIES)
    assert found >= {
        ("topk", "count_digits"),
        ("topk", "tally"),
        ("topk", "emit"),
        ("topk", "pack_sample"),
        ("topk", "cast"),
        ("topk", "quantise_runs"),
        ("topk", "count"),
        ("topk", "expand"),
        ("topk", "decode"),
        *(("topk", kernel) for kernel in ("average_rows", "average_features")),
        *((family, kernel) for family in ("bitmask", "derivative") for kernel in ("_encode", "_apply")),
        *(("bitmask", kernel) for kernel in ("_clamp", "_scale")),
        *(("rowquant", kernel) for kernel in ("_encode", "_decode")),
        *(("layernorm", kernel) for kernel in ("_forward", "_backward")),
        ("softmax", "_backward"),
    }


@pytest.mark.parametrize("family", ["topk", "bitmask", "derivative", "rowquant", "softmax"])
def test_slices_of_a_batch_are_in_the_list(family: str, configurations: list[ahead.Configuration]) -> None:
    """Their pointers are not aligned to 16 bytes, which makes other code of a kernel."""
    unaligned = set()
    for configuration in configurations:
        pointers = {i for i, (_, kind) in enumerate(configuration.signature) if kind.startswith("*")}
        if configuration.family == family and not pointers <= set(configuration.divisible):
            unaligned.add(configuration.kernel)
    assert unaligned >= {c.kernel for c in configurations if c.family == family} - {"tally", "cast", "count", "decode"}


@pytest.mark.parametrize("family", ["rowquant", "layernorm", "softmax"])
def test_at_most_four_configurations(family: str, configurations: list[ahead.Configuration]) -> None:
    module = import_module(f"backrazor.kernels.{family}.triton")
    assert len(module.CONFIGS) <= MOST_CONFIGURATIONS
    launched = {
        (dict(c.constants)["ROWS"], dict(c.constants)["COLUMNS"], c.warps) for c in configurations if c.family == family
    }
    assert launched == set(module.CONFIGS)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_binaries_keep_to_their_limits(capability: int, configurations: list[ahead.Configuration]) -> None:
    for binary in binaries.compile_all(configurations, capability, workers=os.cpu_count() or 1):
        where = f"{binary.name} for sm_{capability}"
        assert binary.local_bytes == 0, f"{where} spills {binary.local_bytes} bytes per thread"
        assert 0 < binary.registers <= MOST_REGISTERS, f"{where} needs {binary.registers} registers"
        assert binary.shared_bytes <= MOST_SHARED_BYTES, f"{where} needs {binary.shared_bytes} bytes of shared memory"
        assert binary.occupancy >= LEAST_OCCUPANCY, f"{where} fills {binary.occupancy:.0%} of a multiprocessor"


def test_recording_leaves_the_modules_as_they_were() -> None:
    module = import_module("backrazor.kernels.topk.triton")
    before = module.launch
    ahead.configurations()
    assert module.launch is before


def test_a_refused_kernel_is_named(configurations: list[ahead.Configuration]) -> None:
    broken = configurations[0].__class__(**(vars(configurations[0]) | {"constants": ()}))
    with pytest.raises(RuntimeError, match=r"topk.count_digits.* does not compile for sm_90"):
        binaries.compile_one(broken, 90)


def test_no_32_bit_product_feeds_an_address(configurations: list[ahead.Configuration]) -> None:
    """A tensor of 2^31 elements, or a sample of as many, is found like any other."""
    for configuration in configurations:
        found = narrow_products(binaries.intermediate(configuration))
        assert not found, f"{configuration.name}: {found}"


def test_a_program_waits_for_its_own_values_before_it_quantises_them(configurations: list[ahead.Configuration]) -> None:
    """One thread reads what another of its program has written, which the interpreter cannot get wrong: a barrier lies
    between, and no load goes through the cache that nobody keeps up to date."""
    packing = [c for c in configurations if c.kernel == "pack_sample" and dict(c.constants)["INTEGERS"]]
    assert packing
    for configuration in packing:
        assert "barrier" in binaries.intermediate(configuration)
    assert "ld.global.nc" not in binaries.compiled_of(packing[0], 90).asm["ptx"]


@triton.jit
def narrow(x, n, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK) * 2
    tl.store(x + tl.program_id(0) * n + lane, 0)


@triton.jit
def narrow_in_a_loop(x, n, BLOCK: tl.constexpr):
    place = 0
    for row in range(n):
        if row > 3:
            place += row * n
        tl.store(x + place + tl.arange(0, BLOCK), 0)


@triton.jit
def wide(x, n, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK) * 2
    tl.store(x + tl.program_id(0).to(tl.int64) * n + lane, tl.program_id(0) * n)


@pytest.mark.parametrize(("kernel", "products"), [(narrow, 1), (narrow_in_a_loop, 1), (wide, 0)], ids=str)
def test_a_32_bit_product_is_seen(kernel: triton.JITFunction, products: int) -> None:
    signature = ("x", "*i32"), ("n", "i32"), ("BLOCK", "constexpr")
    configuration = ahead.Configuration(
        "test", __name__, kernel.fn.__name__, signature, (("BLOCK", 64),), (0,), 4, None
    )
    assert len(narrow_products(binaries.intermediate(configuration))) == products


def test_the_host_asks_nothing_of_the_default_device(configurations: list[ahead.Configuration]) -> None:
    """Under ``torch.set_default_device("cuda")`` a bound made into a tensor and back would wait for the device; the
    meta device has no numbers to give back at all."""
    with torch.device("meta"):
        assert ahead.configurations() == configurations
