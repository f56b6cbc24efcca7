"""Top-K packing: the fast versions equal the reference bit for bit, and the reference means what it says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from backrazor.codecs import Pruned, kept_count, pack
from backrazor.kernels import Stored, index_bytes, topk_pack, topk_unpack
from backrazor.kernels.dispatch import implementation
from backrazor.kernels.topk import reference
from backrazor.kernels.topk.layout import allocate
from backrazor.kernels.topk.reference import NON_FINITE, OVERFLOW, unpack_bits
from tests.backrazor.compare import assert_same_bits
from tests.backrazor.samples import DATA, layouts, sample

SMALL = (1, 2, 5, 7, 8, 15, 16, 17, 255, 256, 257, 1000)
LARGE = (4095, 4096, 5000, 60000)
SPARSITIES = (0.0, 0.5, 0.9, 0.97, 0.999)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(x: Tensor, codec: Pruned, where: str) -> None:
    """The operator against the reference: everything stored, the status, and what is read back."""
    layout, status = codec.form(x), torch.zeros(1, dtype=torch.int32)
    rows = x.flatten(1)
    *expected, expected_status = reference.pack(rows, layout.keep, layout.values, layout.index)
    actual = topk_pack(x, layout.keep, layout.values, layout.index, status)
    for name, got, wanted in zip(Stored._fields, actual, expected, strict=True):
        assert_same_bits(f"{name} of {where}", got, wanted)
    assert int(status) == expected_status, f"status of {where}"
    dense = topk_unpack(*actual, rows.shape[1], layout.index, x.dtype)
    wanted = reference.unpack(*expected, rows.shape[1], layout.index, x.dtype)
    assert_same_bits(f"x_hat of {where}", dense, wanted)


@pytest.mark.parametrize("values", ["float32", "float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_to_the_reference(dtype: torch.dtype, data: str, values: str) -> None:
    for n in SMALL:
        x = sample(data, (2, n), dtype, seed=n)
        for i, sparsity in enumerate(SPARSITIES):
            index = ("bitmap", "tile")[(i + n) % 2]  # sizes come in odd and even pairs
            check(x, Pruned(sparsity, values, index), f"{data}, n={n}, sparsity={sparsity}, {index}")


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_to_the_reference_on_long_samples(dtype: torch.dtype, data: str) -> None:
    combinations = [
        ("float32", "bitmap"),
        ("bfloat16", "tile"),
        ("int8", "bitmap"),
        ("int8", "tile"),
        ("int4", "bitmap"),
        ("int4", "tile"),
        ("float16", "tile"),
    ]
    for n in LARGE:
        x = sample(data, (2, n), dtype, seed=n)
        for i, sparsity in enumerate(SPARSITIES):
            values, index = combinations[(i + n) % len(combinations)]
            check(x, Pruned(sparsity, values, index), f"{data}, n={n}, sparsity={sparsity}, {values}, {index}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_fast_version_is_what_runs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    x = torch.randn(2, 300).to(dtype)
    assert implementation("topk", x) is not None
    monkeypatch.setattr(reference, "pack", None)
    monkeypatch.setattr(reference, "unpack", None)
    stored = topk_pack(x, 30, "int8", "tile", torch.zeros(1, dtype=torch.int32))
    topk_unpack(*stored, 300, "tile", dtype)


@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_samples_on_any_number_of_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    for batch in range(10):
        for n in (7, 300, 5000):
            check(sample("normal", (batch, n), seed=batch), Pruned(0.9, "bfloat16", "tile"), f"B={batch}, n={n}")


@pytest.mark.parametrize(
    "shape", [(3, 5, 7, 9), (2, 16, 12, 12), (3, 5, 123), (2, 41, 4, 3), (0, 3, 4, 5), (3, 0, 4, 5)]
)
def test_any_layout(shape: tuple[int, ...]) -> None:
    for data in ("normal", "small integers"):
        for dtype in (*DTYPES, torch.float64):
            for layout, x in layouts(sample(data, shape, dtype)).items():
                for values, index in (("float32", "bitmap"), ("int8", "tile"), ("int4", "bitmap")):
                    check(x, Pruned(0.8, values, index), f"{data}, {dtype}, {layout}")


@pytest.mark.parametrize("index", ["bitmap", "tile"])
def test_ties_go_to_the_lowest_index(index: str, flag: Tensor) -> None:
    x = torch.tensor([[1.0, -2.0, 2.0, 0.5, 2.0, -1.0, 1.0, 0.0]])
    stored = topk_pack(x, 5, "float32", index, flag)
    expected = torch.tensor([[1.0, -2.0, 2.0, 0.0, 2.0, -1.0, 0.0, 0.0]])
    assert_same_bits("x_hat", topk_unpack(*stored, 8, index, torch.float32), expected)


def test_ties_follow_the_logical_order_in_any_layout(flag: Tensor) -> None:
    x = torch.ones(1, 3, 4, 5)
    expected = (torch.arange(60) < 20).float().view(1, 3, 4, 5)
    for name, laid_out in layouts(x).items():
        stored = topk_pack(laid_out, 20, "float32", "tile", flag)
        assert_same_bits(name, topk_unpack(*stored, 60, "tile", torch.float32).view(1, 3, 4, 5), expected)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.95, 0.97, 0.999])
def test_the_count_is_static_and_that_of_the_released_rule(sparsity: float, flag: Tensor) -> None:
    for n in (1, 2, 5, 7, 123, 1000, 4096):
        x = torch.randn(1, n)
        threshold = x.abs().flatten().kthvalue(max(math.floor(n * sparsity), 1)).values  # the released code's
        kept = kept_count(n, sparsity)
        assert kept == int((x.abs() >= threshold).sum())
        for data in ("zeros", "all equal", "normal"):
            assert pack(sample(data, (3, n)), Pruned(sparsity, "float32"), flag).tensors[0].shape == (3, kept)
    assert kept_count(0, sparsity) == 0


def test_what_is_kept_is_the_largest(flag: Tensor) -> None:
    x = torch.randn(4, 3000)
    packed = pack(x, Pruned(0.9, "float32"), flag)
    x_hat = packed.unpack()
    smallest_kept = x_hat.abs().masked_fill(x_hat == 0, math.inf).amin(1)
    largest_dropped = x.masked_fill(x_hat != 0, 0).abs().amax(1)
    assert bool((smallest_kept >= largest_dropped).all())
    assert_same_bits("kept values", x_hat[x_hat != 0], x[x_hat != 0])


def test_a_full_tile_is_told_from_an_empty_one(flag: Tensor) -> None:
    x = torch.zeros(2, 256 * 11)
    x[0, 256 * 3 : 256 * 4] = torch.rand(256) + 1
    x[0, 256 * 9 : 256 * 10] = torch.rand(256) + 1
    x[1, 256 * 10 :] = torch.rand(256) + 1
    x[1, :256] = torch.rand(256) + 1
    stored = Stored(*topk_pack(x, 512, "float32", "tile", flag))
    assert not bool(stored.counts.any())  # 256 wraps to 0
    assert unpack_bits(stored.full, 11).nonzero().tolist() == [[0, 3], [0, 9], [1, 0], [1, 10]]
    assert_same_bits("x_hat", topk_unpack(*stored, x.shape[1], "tile", torch.float32), x)


@pytest.mark.parametrize(
    ("x", "values", "expected"),
    [
        (torch.tensor([[1.0, 2.0, 3.0]]), "float16", 0),
        (torch.tensor([[1.0, float("nan"), 3.0]]), "float32", NON_FINITE),
        (torch.tensor([[1.0, -float("inf"), 3.0]]), "float16", NON_FINITE),
        (torch.tensor([[1.0, 1e6, 3.0]]), "float16", OVERFLOW),
        (torch.tensor([[1.0, 1e6, 3.0]]), "bfloat16", 0),
        (torch.tensor([[1.0, 3.4e38, 3.0]]), "bfloat16", OVERFLOW),
        (torch.tensor([[1.0, 3.38e38, 3.0]]), "bfloat16", 0),
        (torch.tensor([[1.0, 65519.0, 3.0]]), "float16", 0),
        (torch.tensor([[1.0, -65520.0, 3.0]]), "float16", OVERFLOW),
        (torch.tensor([[1.0, 1e6, 3.0]]), "int8", 0),
        (torch.tensor([[1.0, 1e38, 3.0]]), "int8", 0),
        (torch.tensor([[1e6, float("inf"), 3.0]]), "float16", NON_FINITE | OVERFLOW),
    ],
)
def test_status(x: Tensor, values: str, expected: int, flag: Tensor) -> None:
    topk_pack(x, 2, values, "bitmap", flag)
    assert int(flag) == expected


def test_status_is_kept_until_it_is_cleared(flag: Tensor) -> None:
    topk_pack(torch.tensor([[1.0, float("nan")]]), 1, "float32", "bitmap", flag)
    topk_pack(torch.tensor([[1.0, 1e6]]), 1, "float16", "bitmap", flag)
    topk_pack(torch.ones(1, 2), 1, "float32", "bitmap", flag)
    assert int(flag) == NON_FINITE | OVERFLOW


@pytest.mark.parametrize("index", ["none", "bitmap", "tile"])
@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_nothing_is_written_outside_the_outputs(values: torch.dtype, index: str, flag: Tensor) -> None:
    fast = pytest.importorskip("backrazor.kernels.topk.cpu")
    torch.set_num_threads(2)
    for n in (1, 7, 17, 257, 1000, 5003):
        keep = n if index == "none" else max(n // 3, 1)
        x = torch.randn(3, n)
        bands, parts = zip(*(guarded(part) for part in allocate(3, n, keep, values, index, x.device)), strict=True)
        fast.pack(x, keep, index, Stored(*parts), flag)
        band, out = guarded(torch.empty(3, n))
        fast.unpack(Stored(*parts), n, index, out)
        for name, guard in zip((*Stored._fields, "out"), (*bands, band), strict=True):
            edges = torch.cat([guard[:BAND], guard[-BAND:]])
            assert bool((edges == 0xAB).all()), f"written beside {name}, n={n}"


BAND = 128


def guarded(like: Tensor) -> tuple[Tensor, Tensor]:
    """(a buffer of 0xAB, a tensor like ``like`` in its middle)."""
    size = like.numel() * like.element_size()
    buffer = torch.full((size + 2 * BAND,), 0xAB, dtype=torch.uint8)
    return buffer, buffer[BAND : BAND + size].view(like.dtype).view(like.shape)


@pytest.mark.parametrize("n", [50_000, 96 * 112 * 112, 197 * 3072])
def test_bits_of_the_tile_index(n: int) -> None:
    for sparsity, bar in ((0.9, 0.84), (0.97, 0.28)):
        keep = kept_count(n, sparsity)
        assert index_bytes(n, keep, "tile") * 8 / n <= bar
        assert Pruned(sparsity, "float32").form(torch.empty(1, n, device="meta")).index == "tile"
    assert Pruned(0.5, "float32").form(torch.empty(1, n, device="meta")).index == "bitmap"
    assert Pruned(0.0, "float32", "tile").form(torch.empty(1, n, device="meta")).index == "none"


@pytest.mark.parametrize("index", ["bitmap", "tile"])
def test_rows_read_alone(index: str, flag: Tensor) -> None:
    x = torch.randn(7, 600)
    for values in ("float32", "int8"):
        packed = pack(x, Pruned(0.8, values, index), flag)
        whole = packed.unpack()
        for start, stop in ((0, 1), (2, 5), (6, 7), (3, 3)):
            assert_same_bits(f"samples {start} to {stop}", packed.unpack(start, stop), whole[start:stop])


def test_the_rounding_of_int8() -> None:
    x = torch.randn(3, 1000)
    values, scales, _ = reference.encode_values(x, "int8")
    back = reference.decode_values(values, scales, x.shape[1], torch.float32)
    steps = scales.float().repeat_interleave(256, dim=1)[:, :1000]
    assert bool(((back - x).abs() <= 0.5001 * steps).all())


@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e-12, 1e-6, 1.0, 1e6, 1e30, 1e38])
def test_eight_bits_have_the_range_of_float32(size: float, flag: Tensor) -> None:
    x = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)).clamp(-3, 3) * size
    x_hat = topk_unpack(*topk_pack(x, 500, "int8", "tile", flag), 1000, "tile", torch.float32)
    kept = x_hat != 0
    assert int(flag) == 0 and int(kept.sum()) > 900
    assert bool(((x_hat - x).abs()[kept] <= 0.51 * 3 * size / 127).all())
