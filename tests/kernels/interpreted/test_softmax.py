"""Fused softmax backward in the interpreter, against the operators it stands for."""

from __future__ import annotations

import torch

from backrazor.kernels import mask_encode, softmax_backward
from backrazor.kernels.softmax import reference
from tests.backrazor.cases import pairwise
from tests.backrazor.compare import LIMITS, assert_close, assert_same_bits
from tests.kernels.interpreted.harness import ORDERS, StrictExecutor

SHAPES = ((2, 3, 5, 7), (1, 1, 1, 1), (3, 2, 9, 65), (2, 1, 3, 197), (2, 1, 2, 1025), (1, 2, 1, 5000), (0, 2, 3, 4))
AXES = {
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "shape": SHAPES,
    "dropout": (0.0, 0.3, 1.0),
    "pruned": (False, True),
    "order": ORDERS,
}


def test_agrees_with_the_reference() -> None:
    for row in pairwise(AXES):
        StrictExecutor.order = row["order"]
        shape, dtype = row["shape"], row["dtype"]
        p = torch.randn(shape).softmax(-1)
        if row["pruned"]:  # the largest stay, as the paper's backward sees them
            p = p * (p > p.median())
        p, grad = p.to(dtype), torch.randn(shape).to(dtype)
        bits, keep_scale = None, 1.0
        if row["dropout"]:
            kept = (torch.rand(shape) >= row["dropout"]).float()
            bits = mask_encode(kept.flatten(1), 0.0, float("nan"))
            keep_scale = 0.0 if row["dropout"] == 1 else 1 / (1 - row["dropout"])
        got = softmax_backward(grad, p, bits, keep_scale, 0.125)
        if p.numel() == 0:
            assert got.shape == shape
            continue
        expected = reference.backward(grad.float(), p.float(), bits, keep_scale, 0.125)
        if shape[-1] > 1 or row["pruned"]:  # of one number the gradient is zero but for rounding
            assert_close(str(row), got, expected, LIMITS[dtype])
        assert_same_bits(f"zeros of {row}", got[p == 0], torch.zeros_like(got[p == 0]) * got[p == 0])
    assert StrictExecutor.launches > 10
