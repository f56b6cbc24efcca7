"""The kernels of guesses in the interpreter: equal to the definition, given the means."""

from __future__ import annotations

import pytest
import torch

from backrazor.kernels import _triton
from backrazor.kernels.topk import triton as topk
from tests.backrazor.test_guess_packing import DTYPES, LIMITS, NAN, SHAPES, check
from tests.kernels.interpreted.harness import ORDERS, StrictExecutor


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, int, int, bool]) -> None:
    for number, limits in enumerate(LIMITS):
        dtype = DTYPES[number]
        StrictExecutor.order = ORDERS[number]
        for sparsity, values in ((0.0, "int8"), (0.5, "int4"), (0.9, "int8"), (0.97, str(dtype)[6:])):
            check(shape, dtype, limits, sparsity, values)
    for bits, values in ((2, "int4"), (4, "int8")):
        for sparsity in (0.0, 0.5, 0.97):
            check(shape, DTYPES[bits // 2], (NAN, NAN), sparsity, values, bits)
    assert StrictExecutor.launches > 0


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("features", [False, True])
def test_samples_in_chunks(features: bool, counted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "SAMPLE_ELEMENTS", 0)
    monkeypatch.setattr(_triton, "FILLING_PROGRAMS", 4)
    monkeypatch.setattr(topk, "COUNTED_ELEMENTS", dict.fromkeys(("bitmap", "tile"), 0 if counted else 1 << 22))
    for limits in LIMITS:
        check((2, 90, 100, features), torch.float32, limits, 0.9, "int4")
    check((2, 90, 100, features), torch.float32, (NAN, NAN), 0.9, "int4", 4)


def test_samples_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "SCRATCH_BYTES", 1)
    check((3, 7, 100, False), torch.float32, (0.0, NAN), 0.9, "int8")


def test_long_rows_and_many_features() -> None:
    check((1, 2, 5000, False), torch.float32, (NAN, NAN), 0.95, "int4")
    check((1, 300, 33, True), torch.bfloat16, (NAN, NAN), 0.95, "int8")
