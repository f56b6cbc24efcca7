"""The kernels of top-K packing in the interpreter: equal to the reference bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backrazor.kernels import Stored, _triton, topk_pack, topk_unpack, topk_unpack_normalised
from backrazor.kernels.topk import reference
from backrazor.kernels.topk import triton as topk
from backrazor.kernels.topk.layout import allocate, cuda_scratch
from backrazor.memory.predict import _Allocations as Allocated
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
    "programs": ("a sample's", "a chunk's", "a chunk's, counted"),
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


@pytest.fixture
def in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample is cut into chunks, as large ones are."""
    monkeypatch.setattr(topk, "SAMPLE_ELEMENTS", 0)


@pytest.mark.parametrize("part", range(8))
def test_equal_to_the_reference(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = topk.SAMPLE_ELEMENTS
    for number, row in enumerate(ROWS[part::8]):
        StrictExecutor.order = row["order"]
        monkeypatch.setattr(topk, "SAMPLE_ELEMENTS", whole if row["programs"] == "a sample's" else 0)
        counted = row["programs"].endswith("counted")
        monkeypatch.setattr(topk, "COUNTED_ELEMENTS", dict.fromkeys(("bitmap", "tile"), -1 if counted else 1 << 22))
        x = sample(row["data"], (2, row["n"]), row["dtype"], seed=number)
        check(x, KEEPS[row["keep"]](row["n"]), row["values"], row["index"], str(row))
    assert StrictExecutor.launches > 0


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_of_several_blocks_in_any_order(
    dtype: torch.dtype, order: str, counted: bool, in_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several chunks per sample and several blocks per chunk; ties, kept and dropped, in all of them."""
    monkeypatch.setattr(_triton, "FILLING_PROGRAMS", 4)
    monkeypatch.setattr(topk, "COUNTED_ELEMENTS", dict.fromkeys(("bitmap", "tile"), 0 if counted else 1 << 22))
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


@pytest.mark.parametrize("values", ["int8", "float32"])
def test_samples_are_packed_some_at_a_time_where_scratch_is_short(
    values: str, in_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topk, "SCRATCH_BYTES", 1)
    x, before = sample("normal", (3, 700)), StrictExecutor.launches
    topk_pack(x, 90, values, "tile", torch.zeros(1, dtype=torch.int32))
    assert StrictExecutor.launches - before == 3 * (5 + (values == "int8"))
    check(x, 90, values, "tile", "one by one")


def test_a_small_sample_is_packed_by_one_launch() -> None:
    x, flag = sample("normal", (5, 4_100)), torch.zeros(1, dtype=torch.int32)
    stored = topk_pack(x, 410, "float32", "tile", flag)
    assert (StrictExecutor.launches, StrictExecutor.programs) == (1, 5)
    topk_unpack(*stored, 4_100, "tile", torch.float32)
    assert (StrictExecutor.launches, StrictExecutor.programs) == (2, 5)
    topk_pack(x, 410, "int8", "tile", flag)
    assert StrictExecutor.launches == 3


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((65_536, 256), torch.float32), ((4_096, 40_000), torch.float32), ((3, 10_000_000), torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("values", ["same", "int8"])
def test_scratch_is_bounded(
    values: str, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a batch of any shape, by what the host's side allocates on tensors without data."""
    batch, n = shape
    stored_as = torch.int8 if values == "int8" else dtype
    keep = n // 10
    monkeypatch.setattr(topk, "launch", lambda *_, **__: None)
    with Allocated() as scratch:
        device = torch.device("meta")
        x, flag = torch.empty(shape, dtype=dtype, device=device), torch.empty(1, dtype=torch.int32, device=device)
        stored = allocate(batch, n, keep, stored_as, "tile", device)
        scratch.peak = scratch.live = 0
        topk.pack(x, keep, "tile", stored, flag)
    assert scratch.peak <= 1.25 * topk.SCRATCH_BYTES
    counted = cuda_scratch(x, keep, str(stored_as).removeprefix("torch."), "tile")
    assert 0.9 * counted <= scratch.peak <= 1.25 * counted  # small batches add counters to fill the device


@pytest.mark.parametrize(("samples", "launches"), [(1, 6), (2, 3), (100, 1)])
def test_samples_in_another_layout_are_copied_some_at_a_time(
    samples: int, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = sample("normal", (6, 9, 5, 7)).contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(topk, "COPIED_BYTES", samples * x[0].numel() * 4)
    topk_pack(x, 31, "float32", "tile", torch.zeros(1, dtype=torch.int32))
    assert StrictExecutor.launches == launches
    check(x, 31, "float32", "tile", "channels_last")


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
