"""One-bit masks and quantised derivatives in the interpreter: equal to the reference bit for bit."""

from __future__ import annotations

import math

import torch

from backrazor.codecs.smooth import ACTIVATIONS, quantiser
from backrazor.kernels import level_apply, level_encode, mask_apply, mask_clamp_, mask_encode, mask_scale
from backrazor.kernels.bitmask import reference as bitmask_reference
from backrazor.kernels.derivative import reference as derivative_reference
from tests.backrazor.cases import pairwise
from tests.backrazor.compare import assert_close, assert_same_bits
from tests.backrazor.samples import DATA, sample
from tests.kernels.interpreted.harness import ORDERS, StrictExecutor

SHARED = {
    "data": tuple(DATA),
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "batch": (0, 1, 3),
    "n": (0, 1, 7, 8, 9, 2048, 2049, 4100),
    "order": ORDERS,
}
BOUNDS = ((0.0, math.nan), (0.0, 6.0), (-1.0, 1.0), (1.0, 1.0), (0.1, 0.3))


def test_masks_are_equal_to_the_reference() -> None:
    for number, row in enumerate(pairwise(SHARED | {"bounds": BOUNDS})):
        StrictExecutor.order = row["order"]
        x = sample(row["data"], (row["batch"], row["n"]), row["dtype"], seed=number)
        bits = mask_encode(x, *row["bounds"])
        assert_same_bits(f"bits of {row}", bits, bitmask_reference.encode(x, *row["bounds"]))
        grad = sample("NaN and Inf", tuple(x.shape), row["dtype"], seed=number)
        assert_same_bits(f"gradient of {row}", mask_apply(grad, bits), bitmask_reference.apply(grad, bits))
        clamped, expected = x.clone(), x.clone()
        assert_same_bits(f"bits of {row}", mask_clamp_(clamped, *row["bounds"]), bits)
        bitmask_reference.clamp_(expected, *row["bounds"])
        assert_same_bits(f"clamped, {row}", clamped, expected)
    assert StrictExecutor.launches > 120


def test_masked_and_scaled_gradients_agree_with_the_reference() -> None:
    axes = SHARED | {"n": ((1, 1), (3, 5), (8, 4), (7, 300), (40, 51)), "masked": (True, False)}
    del axes["data"]
    for number, row in enumerate(pairwise(axes)):
        StrictExecutor.order = row["order"]
        shape, channels = (row["batch"], *row["n"]), row["n"][0]
        grad = sample("normal", shape, row["dtype"], seed=number)
        bits = mask_encode(sample("normal", (shape[0], channels * shape[2])), 0.0, 1.0) if row["masked"] else None
        variance = torch.rand(channels) + 0.1
        weight = torch.randn(channels).to(row["dtype"]) if number % 2 else None
        expected = bitmask_reference.scaled(grad, bits, variance, weight, 1e-3)
        assert_close(f"gradient of {row}", mask_scale(grad, bits, variance, weight, 1e-3), expected, 5e-3)
        if row["dtype"] == torch.float32:
            assert_close(f"gradient of {row}", mask_scale(grad, bits, variance, weight, 1e-3), expected, 1e-6)
    assert StrictExecutor.launches > 20


def test_derivatives_are_equal_to_the_reference() -> None:
    axes = SHARED | {"bits": (2, 4, 8), "activation": tuple(ACTIVATIONS)}
    for number, row in enumerate(pairwise(axes)):
        StrictExecutor.order = row["order"]
        bits = row["bits"]
        thresholds, levels = quantiser(row["activation"], bits)
        x = sample(row["data"], (row["batch"], row["n"]), row["dtype"], seed=number)
        if x.numel():
            x.view(-1)[:: max(x.numel() // 3, 1)] = thresholds[len(thresholds) // 2].to(x.dtype)  # on the edge itself
        codes = level_encode(x, thresholds, bits)
        assert_same_bits(f"codes of {row}", codes, derivative_reference.encode(x, thresholds, bits))
        grad = sample("NaN and Inf", tuple(x.shape), row["dtype"], seed=number)
        expected = derivative_reference.apply(grad, codes, levels, bits)
        assert_same_bits(f"gradient of {row}", level_apply(grad, codes, levels, bits), expected)
    assert StrictExecutor.launches > 80
