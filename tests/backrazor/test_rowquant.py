"""Rows quantised with a scale of their own: the fast version equals the reference, and the reference the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backrazor.kernels import row_decode, row_encode
from backrazor.kernels.dispatch import implementation
from backrazor.kernels.rowquant import reference
from tests.backrazor.compare import assert_same_bits
from tests.backrazor.samples import DATA, sample

SHAPES = ((0, 7), (3, 0), (1, 1), (5, 2), (4, 3), (3, 7), (2, 16), (3, 17), (2, 255), (2, 257), (3, 1000), (2, 12_544))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, reciprocal deviation) per row; those of ones where x is not finite or has no spread."""
    wide = x.double().clamp(-1e30, 1e30).nan_to_num()
    if wide.shape[1] == 0:
        return torch.zeros(x.shape[0]), torch.ones(x.shape[0])
    return wide.mean(1).float(), torch.rsqrt((wide - wide.mean(1, keepdim=True)).square().mean(1) + 1e-5).float()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_to_the_reference(dtype: torch.dtype, data: str, bits: int) -> None:
    for rows, m in SHAPES:
        x = sample(data, (rows, m), dtype, seed=m)
        mean, rstd = statistics(x)
        codes, scales = row_encode(x, mean, rstd, bits)
        expected_codes, expected_scales = reference.encode(x, mean, rstd, bits)
        assert_same_bits(f"scales of {data}, {rows} x {m}", scales, expected_scales)
        assert_same_bits(f"codes of {data}, {rows} x {m}", codes, expected_codes)
        read = row_decode(codes, scales, m, bits, dtype)
        assert_same_bits(f"rows of {data}, {rows} x {m}", read, reference.decode(codes, scales, m, bits, dtype))


@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_rows_on_any_number_of_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    for rows in (*range(10), 1000):
        x = sample("normal", (rows, 77), seed=rows)
        mean, rstd = statistics(x)
        for bits in (4, 8):
            stored = row_encode(x, mean, rstd, bits)
            for name, got, wanted in zip(
                ("codes", "scales"), stored, reference.encode(x, mean, rstd, bits), strict=True
            ):
                assert_same_bits(f"{name}, {rows} rows", got, wanted)
            read = row_decode(*stored, 77, bits, torch.float32)
            assert_same_bits(f"read, {rows} rows", read, reference.decode(*stored, 77, bits, torch.float32))


@pytest.mark.parametrize(("bits", "limit"), [(8, 127), (4, 7)])
def test_the_error_is_at_most_half_a_step(bits: int, limit: int) -> None:
    x = torch.randn(6, 500) * 3 + 2
    mean, rstd = statistics(x)
    normalised = (x - mean[:, None]) * rstd[:, None]
    codes, scales = row_encode(x, mean, rstd, bits)
    read = row_decode(codes, scales, 500, bits, torch.float32)
    step = normalised.abs().amax(1, keepdim=True) / limit
    assert bool(((read - normalised).abs() <= step * (0.5 + limit * 2**-11 + 1e-4)).all())
    assert codes.shape == (6, 500 * bits // 8)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_that_is_not_finite_shows(bits: int) -> None:
    x = torch.randn(3, 40)
    x[1, 7] = torch.nan
    x[2, 3] = torch.inf
    codes, scales = row_encode(x, torch.zeros(3), torch.ones(3), bits)
    assert torch.isfinite(scales).tolist() == [True, False, False]
    assert not bool(torch.isfinite(row_decode(codes, scales, 40, bits, torch.float32)[1:]).all(1).any())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_fast_version_is_what_runs(dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr(reference, "encode", None)
    monkeypatch.setattr(reference, "decode", None)
    x = torch.randn(2, 100).to(dtype)
    assert implementation("rowquant", x) is not None
    row_decode(*row_encode(x, *statistics(x), bits), 100, bits, dtype)
