"""The strict interpreter catches what it is there to catch."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.interpreted.harness import ORDERS, StrictExecutor


@triton.jit
def _copy(x, out, n, shift, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at + shift, tl.load(x + at, mask=at < n, other=0), mask=at < n)


@triton.jit
def _last_writer(out):
    tl.store(out, tl.program_id(0))


@pytest.mark.parametrize(("shift", "where"), [(1, "past"), (-1, "before")])
def test_a_store_outside_a_buffer_is_an_error(shift: int, where: str) -> None:
    x = torch.arange(20, dtype=torch.float32)
    with pytest.raises(MemoryError, match=f"stored {where} buffer 1 of _copy"):
        _copy[(3,)](x, torch.empty(20), 20, shift, BLOCK=8)


def test_a_load_outside_a_buffer_shows() -> None:
    out = torch.zeros(24)
    _copy[(3,)](torch.ones(20), out, 24, 0, BLOCK=8)
    assert out[:20].eq(1).all()
    assert out[20:].isnan().all()


def test_the_order_of_programs_is_what_was_asked_for() -> None:
    last = {}
    for order in ORDERS:
        StrictExecutor.order = order
        out = torch.zeros(1, dtype=torch.int32)
        _last_writer[(5,)](out)
        last[order] = int(out)
    assert (last["forward"], last["backward"], last["odd first"]) == (4, 0, 4)
    assert StrictExecutor.launches == len(ORDERS)
