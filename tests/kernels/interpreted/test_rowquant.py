"""Rows quantised with a scale each, in the interpreter: equal to the reference bit for bit, the affine epilogue too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backrazor.kernels import row_decode, row_encode
from backrazor.kernels.rowquant import reference
from tests.backrazor.cases import pairwise
from tests.backrazor.compare import assert_same_bits
from tests.backrazor.samples import DATA, sample
from tests.kernels.interpreted.harness import ORDERS, StrictExecutor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
AXES = {
    "data": tuple(DATA),
    "dtype": DTYPES,
    "read as": DTYPES,
    "bits": (4, 8),
    "rows": (0, 1, 3, 9),
    "m": (1, 2, 7, 64, 65, 256, 768, 1025, 4096, 4097),
    "affine": ("none", "weight", "bias", "both"),
    "parameters": DTYPES,
    "order": ORDERS,
}
ROWS = pairwise(AXES)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Any mean and reciprocal deviation will do: (R,) float32."""
    return x.float().mean(1).nan_to_num(0.5, 0.5, 0.5), torch.linspace(0.5, 2.0, len(x))


@pytest.mark.parametrize("part", range(4))
def test_equal_to_the_reference(part: int) -> None:
    for number, row in enumerate(ROWS[part::4]):
        StrictExecutor.order = row["order"]
        m, bits, dtype = row["m"], row["bits"], row["read as"]
        x = sample(row["data"], (row["rows"], m), row["dtype"], seed=number)
        codes, scales = row_encode(x, *statistics(x), bits)
        expected_codes, expected_scales = reference.encode(x, *statistics(x), bits)
        assert_same_bits(f"scales of {row}", scales, expected_scales)
        assert_same_bits(f"codes of {row}", codes, expected_codes)
        weight = torch.randn(m).to(row["parameters"]) if row["affine"] in ("weight", "both") else None
        bias = torch.randn(m).to(row["parameters"]) if row["affine"] in ("bias", "both") else None
        dense = row_decode(codes, scales, m, bits, dtype, weight, bias)
        wanted = reference.decode(codes, scales, m, bits, dtype, weight, bias)
        assert_same_bits(f"rows of {row}", dense, wanted)
    assert StrictExecutor.launches > 20
