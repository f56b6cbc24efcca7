"""Fused LayerNorm in the interpreter. Its sums run in another order than PyTorch's, so floats agree to rounding and
codes to a step; where all sums are exact, codes are equal to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backrazor.kernels import norm_backward, norm_forward, row_decode
from backrazor.kernels.layernorm import reference
from backrazor.kernels.layernorm.layout import LONGEST_ROW
from tests.backrazor.cases import pairwise
from tests.backrazor.compare import LIMITS, assert_close, assert_same_bits
from tests.kernels.interpreted.harness import ORDERS, StrictExecutor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
AXES = {
    "dtype": DTYPES,
    "parameters": ("none", "weight", "bias", "both"),
    "bits": (4, 8),
    "rows": (0, 1, 3, 19),
    "m": (1, 2, 7, 64, 197, 256, 257, 768, 1025, 2049, LONGEST_ROW),
    "order": ORDERS,
}
ROWS = pairwise(AXES)
EPS = 1e-5


def parameters(row: dict) -> tuple[Tensor | None, Tensor | None]:
    kind, m, dtype = row["parameters"], row["m"], row["dtype"]
    weight = (1 + 0.2 * torch.randn(m)).to(dtype) if kind in ("weight", "both") else None
    return weight, torch.randn(m).to(dtype) if kind in ("bias", "both") else None


@pytest.mark.parametrize("part", range(3))
def test_forward_agrees_with_torch(part: int) -> None:
    for row in ROWS[part::3]:
        StrictExecutor.order = row["order"]
        m, bits, dtype = row["m"], row["bits"], row["dtype"]
        x = (3 + 2 * torch.randn(row["rows"], m)).to(dtype)
        weight, bias = parameters(row)
        out, codes, scales, rstd = norm_forward(x, weight, bias, EPS, bits)
        expected, *kept, expected_rstd = reference.forward(
            x.float(), *(p if p is None else p.float() for p in (weight, bias)), EPS, bits
        )
        assert_close(f"output of {row}", out, expected, LIMITS[dtype])
        assert_close(f"rstd of {row}", rstd, expected_rstd, LIMITS[torch.float32])
        z, z_expected = (row_decode(*stored, m, bits, torch.float32) for stored in ((codes, scales), kept))
        step = kept[1].float().unsqueeze(1)
        assert bool(((z - z_expected).abs() <= 1.01 * step).all()), f"codes of {row}"
        assert float((z - z_expected).abs().gt(0.01 * step).float().mean() if z.numel() else 0) < 0.01, row


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_equal_to_the_bit_where_sums_are_exact(dtype: torch.dtype, bits: int) -> None:
    """Whole numbers whose mean is one too, in a row whose length is a power of two."""
    for m in (2, 64, 512):
        half = torch.randint(-8, 9, (9, m // 2)).float()
        x = torch.cat([half, -half], dim=1)[:, torch.randperm(m)].to(dtype)
        _, codes, scales, rstd = norm_forward(x, None, None, 1.0, bits)
        _, *expected, expected_rstd = reference.forward(x.float(), None, None, 1.0, bits)
        assert_close(f"rstd, m={m}", rstd, expected_rstd, 1e-6)
        _, *expected = x, *reference.rowquant.encode(x, torch.zeros(9), rstd, bits)
        assert_same_bits(f"codes, m={m}", codes, expected[0])
        assert_same_bits(f"scales, m={m}", scales, expected[1])


@pytest.mark.parametrize("part", range(3))
def test_backward_agrees_with_the_reference(part: int) -> None:
    for row in ROWS[part::3]:
        m, bits, dtype = row["m"], row["bits"], row["dtype"]
        weight, _ = parameters(row)
        x = torch.randn(row["rows"], m)
        _, codes, scales, rstd = reference.forward(x, None, None, EPS, bits)
        grad = torch.randn(row["rows"], m).to(dtype)
        StrictExecutor.order = row["order"]
        got = norm_backward(grad, codes, scales, rstd, weight, bits)
        expected = reference.backward(grad.float(), codes, scales, rstd, weight, bits)
        if m > 1:  # of one number the gradient is zero but for rounding
            assert_close(f"input gradient of {row}", got[0], expected[0], LIMITS[dtype])
        assert_close(f"weight gradient of {row}", got[1], expected[1], LIMITS[torch.float32])
        assert_close(f"bias gradient of {row}", got[2], expected[2], LIMITS[torch.float32])


def test_partial_sums_of_many_programs_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer programs than blocks of rows: each takes several in turn. The order of programs does not show in a bit."""
    monkeypatch.setattr("backrazor.kernels.layernorm.triton.SUMMING_PROGRAMS", 3)
    x, grad = torch.randn(77, 100), torch.randn(77, 100)
    _, codes, scales, rstd = reference.forward(x, None, None, EPS, 4)
    found = {}
    for order in ORDERS:
        StrictExecutor.order = order
        found[order] = norm_backward(grad, codes, scales, rstd, None, 4)
    expected = reference.backward(grad, codes, scales, rstd, None, 4)
    for name, got, wanted, other in zip("xwb", found["forward"], expected, found["shuffled"], strict=True):
        assert_close(name, got, wanted, 1e-5)
        assert_same_bits(name, got, other)


def test_a_row_that_is_not_finite_shows() -> None:
    x = torch.randn(3, 40)
    x[1, 5] = torch.nan
    out, _, scales, _ = norm_forward(x, None, None, EPS, 4)
    assert out.isnan().any(1).tolist() == scales.isnan().tolist() == [False, True, False]
