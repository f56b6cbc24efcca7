"""One bit per element: the fast version equals the reference, and both PyTorch's derivative."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from backrazor.kernels import mask_apply, mask_clamp_, mask_encode, mask_scale
from backrazor.kernels.bitmask import reference
from backrazor.kernels.dispatch import implementation
from tests.backrazor.compare import LIMITS, assert_close, assert_same_bits
from tests.backrazor.samples import DATA, sample

SIZES = (0, 1, 2, 5, 7, 8, 9, 15, 16, 17, 31, 33, 255, 257, 1000, 8191, 8192, 8193, 70_001)
BOUNDS = {"relu": (0.0, math.nan), "relu6": (0.0, 6.0), "hardtanh": (-1.0, 1.0), "empty": (1.0, 1.0)}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_to_the_reference(dtype: torch.dtype, data: str, bounds: str) -> None:
    for n in SIZES:
        x = sample(data, (2, n), dtype, seed=n)
        bits = mask_encode(x, *BOUNDS[bounds])
        assert_same_bits(f"bits of {data}, n={n}", bits, reference.encode(x, *BOUNDS[bounds]))
        grad = sample("NaN and Inf" if n % 2 else "normal", (2, n), dtype, seed=n + 1)
        assert_same_bits(f"gradient, {data}, n={n}", mask_apply(grad, bits), reference.apply(grad, bits))


@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_samples_on_any_number_of_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    for batch in range(10):
        for n in (3, 999, 20_000):
            x = sample("normal", (batch, n), seed=batch)
            bits = mask_encode(x, 0.0, 6.0)
            assert_same_bits(f"bits, B={batch}, n={n}", bits, reference.encode(x, 0.0, 6.0))
            assert_same_bits(f"gradient, B={batch}, n={n}", mask_apply(x, bits), reference.apply(x, bits))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_bits_are_the_derivative(dtype: torch.dtype) -> None:
    x = torch.tensor([[-math.inf, -1.0, -0.0, 0.0, 1e-30, 1.0, 5.99, 6.0, 6.01, math.inf, math.nan]]).to(dtype)
    for function, bounds in ((F.relu, BOUNDS["relu"]), (F.relu6, BOUNDS["relu6"]), (F.hardtanh, BOUNDS["hardtanh"])):
        leaf = x.clone().requires_grad_()
        function(leaf).backward(torch.full_like(x, 3.0))
        got = mask_apply(torch.full_like(x, 3.0), mask_encode(x, *bounds))
        assert_same_bits(function.__name__, got, leaf.grad)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_clamping_with_its_bits_is_the_activation(dtype: torch.dtype) -> None:
    x = torch.tensor([[-math.inf, -1.0, 0.0, 1e-30, 1.0, 5.99, 6.0, 6.01, math.inf, math.nan]]).to(dtype)
    for function, bounds in ((F.relu, BOUNDS["relu"]), (F.relu6, BOUNDS["relu6"]), (F.hardtanh, BOUNDS["hardtanh"])):
        y = x.clone()
        assert_same_bits("bits", mask_clamp_(y, *bounds), mask_encode(x, *bounds))
        assert_same_bits(function.__name__, y, function(x))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_mask_and_scale_are_the_gradient_of_a_frozen_norm_and_its_activation(dtype: torch.dtype, masked: bool) -> None:
    x, grad = torch.randn(3, 5, 4, 7).to(dtype).requires_grad_(), torch.randn(3, 5, 4, 7).to(dtype)
    mean, variance, weight, bias = torch.randn(5), torch.rand(5) + 0.5, torch.randn(5), torch.randn(5)
    if dtype == torch.float64:
        mean, variance, weight, bias = (t.double() for t in (mean, variance, weight, bias))
    y = F.batch_norm(x, mean, variance, weight, bias, False, 0.0, 1e-3)
    (F.relu6(y) if masked else y).backward(grad)
    bits = mask_encode(y.detach().flatten(1), 0.0, 6.0) if masked else None
    got = mask_scale(grad, bits, variance, weight, 1e-3)
    assert got.dtype == dtype
    assert_close("gradient", got.double(), x.grad.double(), 1e-6 if dtype == torch.float64 else LIMITS[dtype])


def test_a_byte_holds_eight_elements_lowest_bit_first() -> None:
    x = torch.tensor([[1.0, -1, 1, 1, -1, -1, -1, 1, 1, -1, 1]])
    assert mask_encode(x, 0.0, math.nan).tolist() == [[0b10001101, 0b101]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_fast_version_is_what_runs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr(reference, "encode", None)
    monkeypatch.setattr(reference, "apply", None)
    x: Tensor = torch.randn(2, 100).to(dtype)
    assert implementation("bitmask", x) is not None
    mask_apply(x, mask_encode(x, 0.0, 6.0))
