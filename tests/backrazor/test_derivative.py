"""The quantised derivative: kernels against the reference, tables against brute force and the definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from backrazor.codecs.smooth import ACTIVATIONS, _segment, quantiser
from backrazor.kernels import level_apply, level_encode
from backrazor.kernels.derivative import reference
from backrazor.kernels.dispatch import implementation
from tests.backrazor.compare import assert_same_bits
from tests.backrazor.samples import DATA, sample

SIZES = (0, 1, 2, 3, 4, 5, 7, 15, 16, 17, 33, 255, 257, 1000, 8193, 40_001)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_to_the_reference(dtype: torch.dtype, data: str, bits: int) -> None:
    thresholds, levels = quantiser("gelu", bits)
    for n in SIZES:
        if bits == 8 and n > 10_000:
            continue  # the reference compares with 255 thresholds in turn
        x = sample(data, (2, n), dtype, seed=n)
        codes = level_encode(x, thresholds, bits)
        assert_same_bits(f"codes of {data}, n={n}", codes, reference.encode(x, thresholds, bits))
        grad = sample("normal", (2, n), dtype, seed=n + 1)
        assert_same_bits(
            f"gradient, n={n}", level_apply(grad, codes, levels, bits), reference.apply(grad, codes, levels, bits)
        )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_any_number_of_samples_on_any_number_of_threads(bits: int, threads: int) -> None:
    torch.set_num_threads(threads)
    thresholds, levels = quantiser("silu", bits)
    for batch in range(10):
        for n in (3, 5000):
            x = sample("normal", (batch, n), seed=batch)
            codes = level_encode(x, thresholds, bits)
            assert_same_bits(f"codes, B={batch}, n={n}", codes, reference.encode(x, thresholds, bits))
            expected = reference.apply(x, codes, levels, bits)
            assert_same_bits(f"gradient, B={batch}, n={n}", level_apply(x, codes, levels, bits), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_count_the_thresholds_that_are_reached(bits: int) -> None:
    thresholds, _ = quantiser("gelu", bits)
    x = torch.cat([thresholds, thresholds.nextafter(torch.tensor(-torch.inf)), torch.randn(500)]).unsqueeze(0)
    codes = reference.unpack_codes(level_encode(x, thresholds, bits), x.shape[1], bits)
    expected = torch.bucketize(x, thresholds, right=True)
    assert_same_bits("codes", codes.long(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "thresholds",
    [
        torch.linspace(-5.9531, 5.9531, 255),  # even, in steps that are no power of two
        (torch.arange(255) - 126) / 32,  # such steps, but not about zero
        (torch.arange(255) - 127) / 8,
        torch.linspace(-1, 1, 255) ** 3,
    ],
    ids=["even", "shifted", "coarse", "cubes"],
)
def test_eight_bits_with_other_thresholds(thresholds: Tensor, dtype: torch.dtype) -> None:
    edges = torch.cat([thresholds, thresholds.nextafter(torch.tensor(-torch.inf))])
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 1e-30, -1e-30])
    x = torch.cat([edges, special, torch.randn(500) * 3]).to(dtype).unsqueeze(0)
    assert_same_bits("codes", level_encode(x, thresholds, 8), reference.encode(x, thresholds, 8))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_survive_packing(bits: int) -> None:
    for n in (1, 2, 3, 4, 5, 8, 123):
        codes = torch.randint(0, 2**bits, (3, n), dtype=torch.uint8)
        packed = reference.pack_codes(codes, bits)
        assert packed.shape == (3, -(-n * bits // 8))
        assert_same_bits("codes", reference.unpack_codes(packed, n, bits), codes)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_segmentation_is_the_best_there_is(count: int) -> None:
    generator = np.random.default_rng(count)
    for _ in range(5):
        value, weight = generator.normal(size=14), generator.random(14) + 0.01
        best = min(
            segmentation_cost((0, *inner, 14), value, weight)
            for inner in itertools.combinations(range(1, 14), count - 1)
        )
        found = segmentation_cost(tuple(_segment(value, weight, count)), value, weight)
        assert found == pytest.approx(best, rel=1e-9, abs=1e-12)


def segmentation_cost(edges: tuple[int, ...], value: np.ndarray, weight: np.ndarray) -> float:
    """The weighted squared error around the mean of each run."""
    total = 0.0
    for a, b in itertools.pairwise(edges):
        mean = np.average(value[a:b], weights=weight[a:b])
        total += float(np.sum(weight[a:b] * (value[a:b] - mean) ** 2))
    return total


def moments(function: np.ndarray, x: np.ndarray) -> float:
    """The mean of ``function`` for x normal with deviation 1.5, on an even grid."""
    weight = np.exp(-0.5 * (x / 1.5) ** 2)
    return float(np.average(function, weights=weight))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_two_bits_beat_every_table_of_a_coarse_grid(name: str) -> None:
    """Brute force: no triple of thresholds on a grid of 1/2, with its best levels, errs less than the library's."""
    x = (np.arange(-6, 6, 1 / 64) + 1 / 128).round(6)
    value = ACTIVATIONS[name].derivative(x)
    weight = np.exp(-0.5 * (x / 1.5) ** 2) + 1e-6
    thresholds, levels = (part.double().numpy() for part in quantiser(name, 2))
    own = np.average((value - levels[np.searchsorted(thresholds, x, side="right")]) ** 2, weights=weight)
    best = np.inf
    for inner in itertools.combinations(range(32, len(x), 32), 3):
        best = min(best, segmentation_cost((0, *inner, len(x)), value, weight) / weight.sum())
    assert own <= best * (1 + 1e-6)
    assert own > 0


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_tables_have_no_bias_and_get_finer(name: str, bits: int) -> None:
    x = np.linspace(-6, 6, 24_001)
    value = ACTIVATIONS[name].derivative(x)
    thresholds, levels = quantiser(name, bits)
    assert thresholds.shape == (2**bits - 1,)
    assert levels.shape == (2**bits,)
    assert bool((thresholds.diff() > 0).all())
    read = levels.numpy()[np.searchsorted(thresholds.numpy(), x, side="right")]
    assert abs(moments(read - value, x)) < 2e-3
    limit = {2: 0.12, 4: 0.03, 8: 0.01} if name != "hardswish" else {2: 0.14, 4: 0.04, 8: 0.01}  # it jumps at -3 and 3
    assert moments((read - value) ** 2, x) ** 0.5 < limit[bits]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_are_those_of_the_forward(name: str) -> None:
    x = torch.linspace(-7, 7, 1401, dtype=torch.float64)
    x = x[(x.abs() - 3).abs() > 1e-6].requires_grad_()  # Hardswish has corners at -3 and 3
    ACTIVATIONS[name].forward(x).sum().backward()
    expected = torch.from_numpy(ACTIVATIONS[name].derivative(x.detach().numpy()))
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_fast_version_is_what_runs(dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr(reference, "encode", None)
    monkeypatch.setattr(reference, "apply", None)
    x: Tensor = torch.randn(2, 100).to(dtype)
    assert implementation("derivative", x) is not None
    thresholds, levels = quantiser("gelu", bits)
    level_apply(x, level_encode(x, thresholds, bits), levels, bits)
