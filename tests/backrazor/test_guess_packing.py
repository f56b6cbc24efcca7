"""Packing what differs from a guess: every implementation equals the definition, given the same means."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from backrazor import kernels
from backrazor.codecs.smooth import ACTIVATIONS, outputs, quantiser
from backrazor.kernels.cpu import layout as cpu_layout
from backrazor.kernels.guess import layout, reference
from backrazor.kernels.topk import layout as topk_layout
from backrazor.kernels.topk import reference as topk
from backrazor.kernels.topk.layout import Stored
from tests.backrazor.compare import assert_close, assert_same_bits

NAN = math.nan
LIMITS = [(NAN, NAN), (0.0, 6.0), (0.0, NAN)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# samples, rows, elements per row, whether rows are features
SHAPES = [
    (3, 10, 30, False),
    (2, 7, 49, False),
    (2, 5, 9, False),
    (2, 32, 400, False),
    (1, 3, 4001, False),
    (2, 300, 7, False),
    (2, 1, 1, False),
    (2, 10, 196, True),
    (2, 197, 24, True),
    (3, 1, 50, True),
]


def drawn(shape: tuple[int, int, int, bool], low: float, high: float, dtype: torch.dtype) -> Tensor:
    batch, rows, length, _ = shape
    x = torch.randn(batch, rows * length) * 2 + 0.7
    if low == 0:
        x = x.clamp(0, None if math.isnan(high) else high)
    return x.to(dtype)


def check(
    shape: tuple[int, int, int, bool],
    dtype: torch.dtype,
    limits: tuple[float, float],
    sparsity: float,
    values: str,
    bits: int = 0,
) -> None:
    """Pack and unpack against the definition, given the means that were packed; these are right to half a step.
    ``bits``: those of an activation's codes, 0 for none."""
    (_, rows, length, features), (low, high), flag = shape, limits, torch.zeros(1, dtype=torch.int32)
    n = rows * length
    keep = max(int(n * (1 - sparsity)), 1)
    index = "none" if keep == n else "bitmap" if sparsity < 0.8 else "tile"
    name = f"{shape}, {dtype}, {limits}, {sparsity}, {values}, {bits}"
    x = drawn(shape, low, high, dtype)
    known = levels = told = None
    if bits:
        thresholds, _ = quantiser("silu", bits)
        known, levels = kernels.level_encode(x, thresholds, bits), outputs("silu", bits)
        x = ACTIVATIONS["silu"].forward(x)
        told = reference.told(layout.Guesses(known, known, features, known=known, levels=levels), n)
    packed = kernels.guess_pack(x, keep, values, index, rows, features, low, high, known, levels, flag)
    *stored, codes, scales = packed
    guess = topk.decode_values(codes, scales, rows, torch.float32)
    means = reference.means(x, rows, features, low, high, told)
    assert_close(f"means of {name}", guess, means, 0.008)  # of 127 steps, and the scale's rounding
    *wanted, _ = topk.pack(reference.without(x, guess, features, low, high, told), keep, values, index)
    for part, (got, want) in zip(Stored._fields, zip(stored, wanted, strict=True), strict=True):
        assert_same_bits(f"{part} of {name}", got, want)
    mask = None if math.isnan(low) else kernels.mask_encode(x, low, high)
    x_hat = kernels.guess_unpack(*packed, known if bits else mask, levels, n, features, index, dtype)
    expected = topk.unpack(*stored, n, index, dtype)
    reference.add_(expected, guess, mask, features, told)
    assert torch.equal(x_hat, expected), f"x_hat of {name}"
    assert int(flag) == 0


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packing_and_unpacking_equal_the_definition(dtype: torch.dtype, limits: tuple[float, float]) -> None:
    for shape in SHAPES:
        for sparsity in (0.0, 0.5, 0.9, 0.99):
            for values in ("int8", "int4", str(dtype).removeprefix("torch.")):
                check(shape, dtype, limits, sparsity, values)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_of_an_activation_tell_of_each_element(dtype: torch.dtype, bits: int) -> None:
    for shape in SHAPES:
        for sparsity in (0.0, 0.5, 0.9, 0.99):
            for values in ("int8", "int4", str(dtype).removeprefix("torch.")):
                check(shape, dtype, (NAN, NAN), sparsity, values, bits)


def test_samples_that_lie_apart_are_packed_as_contiguous_ones(flag: Tensor) -> None:
    x = torch.randn(3, 8, 6, 7)
    apart = x.contiguous(memory_format=torch.channels_last)
    arguments = (30, "int4", "tile", 8, False, NAN, NAN, None, None, flag)
    for got, want in zip(kernels.guess_pack(apart, *arguments), kernels.guess_pack(x, *arguments), strict=True):
        assert_same_bits("part", got, want)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, NAN])
@pytest.mark.parametrize("features", [False, True])
def test_bad_numbers_are_told(bad: float, features: bool, flag: Tensor) -> None:
    x = torch.randn(2, 600)
    x[1, 123] = bad
    kernels.guess_pack(x, 60, "int8", "tile", 20, features, NAN, NAN, None, None, flag)
    assert int(flag) & topk_layout.NON_FINITE


def test_ties_and_constant_rows(flag: Tensor) -> None:
    """Where all differences are equal the sampled interval misses: the exact selection takes its place."""
    x = torch.arange(16.0).repeat_interleave(1024).repeat(2, 1)
    x[:, ::2] += 1
    packed = kernels.guess_pack(x, 1000, "float32", "tile", 16, False, NAN, NAN, None, None, flag)
    guess = topk.decode_values(*packed[5:], 16, torch.float32)
    *wanted, _ = topk.pack(reference.without(x, guess, False, NAN, NAN), 1000, "float32", "tile")
    for part, (got, want) in zip(Stored._fields, zip(packed[:5], wanted, strict=True), strict=True):
        assert_same_bits(part, got, want)


def test_no_setting_of_a_kernel_is_a_first_index() -> None:
    """LLVM 20 and 21 confuse them (see ``cpu.layout``): samples of 64 elements were read beyond their end."""
    from backrazor.kernels.guess import _cpu_form

    settings = {*cpu_layout.KIND.values(), *topk_layout.VALUE_KIND.values(), *topk_layout.INDEX.values()}
    assert not {0, 1} & (settings | set(_cpu_form.FILLS))


def test_guesses_take_a_byte_per_row() -> None:
    guesses = layout.allocate(3, 300, False, NAN, NAN, torch.device("cpu"))
    assert guesses.codes.shape == (3, 300) and guesses.scales.shape == (3, 2)
