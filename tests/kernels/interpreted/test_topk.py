"""The kernels of top-K packing in the interpreter: equal to the reference bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backrazor.kernels import Stored, _triton, topk_pack, topk_unpack, topk_unpack_normalised
from backrazor.kernels.topk import reference
from tests.backrazor.cases import pairwise
from tests.backrazor.compare import assert_same_bits
from tests.backrazor.samples import DATA, layouts, sample
from tests.kernels.interpreted.harness import ORDERS, StrictExecutor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = (1, 2, 7, 8, 123, 256, 257, 2048, 2049, 4100)
KEEPS = {
    "one": lambda n: 1,
    "a tenth": lambda n: max(n // 10, 1),
    "half": lambda n: (n + 1) // 2,
    "all but one": lambda n: max(n - 1, 1),
    "all": lambda n: n,
}
AXES = {
    "data": tuple(DATA),
    "dtype": DTYPES,
    "values": ("float32", "float16", "bfloat16", "int8"),
    "index": ("bitmap", "tile"),
    "keep": tuple(KEEPS),
    "n": SIZES,
    "order": ORDERS,
}


def check(x: Tensor, keep: int, values: str, index: str, where: str) -> None:
    """Pack and unpack against the reference: what is stored, the status, what is read back in each type."""
    index = "none" if keep == x[0].numel() and index != "tile" else index
    if x.element_size() == 2 and values != "int8":
        values = str(x.dtype).removeprefix("torch.")  # a 16-bit input is not rounded again
    status, rows = torch.zeros(1, dtype=torch.int32), x.reshape(x.shape[0], -1)
    *expected, expected_status = reference.pack(rows, keep, values, index)
    actual = topk_pack(x, keep, values, index, status)
    for name, got, wanted in zip(Stored._fields, actual, expected, strict=True):
        assert_same_bits(f"{name} of {where}", got, wanted)
    assert int(status) == expected_status, f"status of {where}"
    dtype = DTYPES[len(where) % 3]
    dense = topk_unpack(*actual, rows.shape[1], index, dtype)
    assert_same_bits(f"x_hat of {where}", dense, reference.unpack(*expected, rows.shape[1], index, dtype))


ROWS = pairwise(AXES)


@pytest.mark.parametrize("part", range(8))
def test_equal_to_the_reference(part: int) -> None:
    for number, row in enumerate(ROWS[part::8]):
        StrictExecutor.order = row["order"]
        x = sample(row["data"], (2, row["n"]), row["dtype"], seed=number)
        check(x, KEEPS[row["keep"]](row["n"]), row["values"], row["index"], str(row))
    assert StrictExecutor.launches > 0


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_of_several_blocks_in_any_order(dtype: torch.dtype, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks a sample and several blocks a chunk; ties, kept and dropped, in all of them."""
    monkeypatch.setattr(_triton, "FILLING_PROGRAMS", 4)
    StrictExecutor.order = order
    data, values, index = ("small integers", "int8", "tile") if order != "shuffled" else ("normal", "float32", "bitmap")
    check(sample(data, (2, 9_000), dtype), 2_000, values, index, f"{data}, {values}, {index}")
    assert StrictExecutor.programs == 4


def test_one_large_sample_fills_the_device() -> None:
    """Batch 1 with a million elements is cut into as many programs as fill a device."""
    chunk, chunks = _triton.chunks_of(1, 1_000_000, 2048)
    assert chunk == 2048
    assert chunks == 489
    assert _triton.chunks_of(128, 600_000, 2048)[1] * 128 <= 5 * _triton.FILLING_PROGRAMS


@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (2, 3, 123)])
def test_any_layout(shape: tuple[int, ...]) -> None:
    for layout, x in layouts(sample("small integers", shape)).items():
        check(x, x[0].numel() // 3, "int8", "tile", layout)


def test_kept_values_on_their_way_to_int8_take_bounded_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Staging sample by sample gives what staging the batch gives."""
    monkeypatch.setattr("backrazor.kernels.topk.triton.STAGED_BYTES", 1)
    check(sample("normal", (3, 700)), 90, "int8", "tile", "staged one by one")


def test_a_sample_too_large_for_32_bit_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="too large for the CUDA kernels"):
        _triton.chunks_of(1, 1 << 31, 2048)


def test_the_normalising_epilogue_is_equal_to_the_reference() -> None:
    axes = {
        "data": ("normal", "NaN and Inf"),
        "values": ("float32", "bfloat16", "int8"),
        "index": ("bitmap", "tile", "none"),
        "as": DTYPES,
        "rows": (1, 3, 20),
        "row": (1, 7, 130),
        "order": ORDERS,
    }
    for number, row in enumerate(pairwise(axes)):
        StrictExecutor.order = row["order"]
        rows, n = row["rows"], row["rows"] * row["row"]
        keep = n if row["index"] == "none" else max(n // 5, 1)
        x = sample(row["data"], (2, n), seed=number)
        stored = topk_pack(x, keep, row["values"], row["index"], torch.zeros(1, dtype=torch.int32))
        mean, rstd = torch.randn(2, rows), torch.rand(2, rows) + 0.5
        got = topk_unpack_normalised(*stored, mean, rstd, n, row["row"], row["index"], row["as"])
        x_hat = reference.unpack(*stored, n, row["index"], torch.float32)
        wanted = reference.normalise(x_hat, mean, rstd, row["row"]).to(row["as"])
        assert_same_bits(str(row), got, wanted)
