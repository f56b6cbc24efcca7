"""Tensors of more than 2^31 elements: the last program of each launch finds its place. Their memory is reserved and
hardly touched: only what that program reads and writes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from backrazor import kernels
from backrazor.codecs.smooth import quantiser
from backrazor.kernels import Stored
from backrazor.kernels.bitmask import reference as bitmask
from backrazor.kernels.derivative import reference as derivative
from backrazor.kernels.layernorm import reference as layernorm
from backrazor.kernels.rowquant import reference as rowquant
from backrazor.kernels.softmax import reference as softmax
from backrazor.kernels.topk import reference as topk
from tests.backrazor.compare import assert_close, assert_same_bits
from tests.kernels.interpreted.harness import StrictExecutor

N = 1 << 15
BATCH = (1 << 16) + 600
assert BATCH * N > 1 << 31


@pytest.fixture
def x(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tensor]:
    """float16 (BATCH, N), of which the last sample has values."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(StrictExecutor, "last_only", True)
    try:
        large = torch.empty(BATCH, N, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("no 4.3 GB of address space to reserve")
    large[-1] = torch.randn(N)
    yield large


@pytest.mark.parametrize("programs", ["a sample's", "a chunk's"])
@pytest.mark.parametrize("index", ["bitmap", "tile"])
def test_topk(x: Tensor, index: str, programs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "backrazor.kernels.topk.triton"
    monkeypatch.setattr(f"{module}.SAMPLE_ELEMENTS", N if programs == "a sample's" else 0)
    monkeypatch.setattr(f"{module}.SCRATCH_BYTES", 1 << 40)  # all samples in one launch
    keep = N // 10
    stored = kernels.topk_pack(x, keep, "float16", index, torch.zeros(1, dtype=torch.int32))
    expected = topk.pack(x[-1:], keep, "float16", index)[:5]
    for name, got, wanted in zip(Stored._fields, stored, expected, strict=True):
        assert_same_bits(name, got[-1:] if got.numel() else got, wanted)
    dense = kernels.topk_unpack(*stored, N, index, torch.float16)
    assert_same_bits("x_hat", dense[-1:], topk.unpack(*expected, N, index, torch.float16))


def test_elementwise(x: Tensor) -> None:
    bits = kernels.mask_encode(x, 0.0, 1.0)
    assert_same_bits("bits", bits[-1:, -8:], bitmask.encode(x[-1:], 0.0, 1.0)[:, -8:])
    bits[-1:] = bitmask.encode(x[-1:], 0.0, 1.0)
    assert_same_bits("masked", kernels.mask_apply(x, bits)[-1:, -64:], bitmask.apply(x[-1:], bits[-1:])[:, -64:])
    wide, one = x.view(BATCH, 8, -1), torch.ones(8)
    scaled = kernels.mask_scale(wide, bits, one, one, 0.0)
    assert_same_bits("scaled", scaled[-1:, -1, -64:], bitmask.scaled(wide[-1:], bits[-1:], one, one, 0.0)[:, -1, -64:])
    thresholds, levels = quantiser("gelu", 2)
    codes = kernels.level_encode(x, thresholds, 2)
    assert_same_bits("codes", codes[-1:, -8:], derivative.encode(x[-1:], thresholds, 2)[:, -8:])
    codes[-1:] = derivative.encode(x[-1:], thresholds, 2)
    product = kernels.level_apply(x, codes, levels, 2)
    assert_same_bits("product", product[-1:, -64:], derivative.apply(x[-1:], codes[-1:], levels, 2)[:, -64:])


def test_rows(x: Tensor) -> None:
    mean, rstd = torch.zeros(BATCH), torch.ones(BATCH)
    codes, scales = kernels.row_encode(x, mean, rstd, 4)
    expected = rowquant.encode(x[-1:], mean[-1:], rstd[-1:], 4)
    assert_same_bits("codes", codes[-1:], expected[0])
    assert_same_bits("scales", scales[-1:], expected[1])
    dense = kernels.row_decode(codes, scales, N, 4, torch.float16)
    assert_same_bits("rows", dense[-1:], rowquant.decode(*expected, N, 4, torch.float16))
    gradient = kernels.softmax_backward(x.view(BATCH, 1, 1, N), x.view(BATCH, 1, 1, N), None, 1.0, 0.001)
    wanted = softmax.backward(x[-1:].float(), x[-1:].float(), None, 1.0, 0.001)
    assert_close("softmax", gradient[-1, 0], wanted, 2e-3)


def test_norms(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = 4096  # so that the last one has few rows to go through
    monkeypatch.setattr("backrazor.kernels.layernorm.triton.SUMMING_PROGRAMS", programs)
    rows = x.view(-1, 4096)
    out, codes, scales, rstd = kernels.norm_forward(rows, None, None, 1e-5, 4)
    expected, *kept, expected_rstd = layernorm.forward(rows[-1:].float(), None, None, 1e-5, 4)
    assert_close("output", out[-1:], expected, 2e-3)
    assert_close("rstd", rstd[-1:], expected_rstd, 1e-5)
    last = len(rows) // programs * programs - 1  # of the rows that the last program of backward takes
    assert last * 4096 >= 1 << 31
    rows[last] = torch.randn(4096)
    codes[last : last + 1], scales[last] = kept[0], kept[1][0]
    rstd[last] = 2.0
    gradient, *_ = kernels.norm_backward(rows, codes, scales, rstd, None, 4)
    wanted, *_ = layernorm.backward(rows[last : last + 1].float(), *kept, rstd[last : last + 1], None, 4)
    assert_close("gradient", gradient[last : last + 1], wanted, 2e-3)


def test_one_sample_of_more_than_2_31_elements(x: Tensor) -> None:
    """Without an index nothing numbers positions in 32 bits, so a sample may be this large."""
    sample = x.view(1, -1)
    n = sample.shape[1]
    stored = kernels.topk_pack(sample, n, "int8", "none", torch.zeros(1, dtype=torch.int32))
    last = -(n % 2048 or 2048)  # what the last program writes
    expected = topk.pack(sample[:, last:], -last, "int8", "none")
    assert_same_bits("values", stored[0][:, last:], expected[0])
    assert_same_bits("scales", stored[1][:, last // 256 :], expected[1])
    dense = kernels.topk_unpack(*stored, n, "none", torch.float16)
    assert_same_bits("x_hat", dense[:, last:], topk.unpack(*expected[:5], -last, "none", torch.float16))
    mean, rstd = torch.zeros(1, BATCH), torch.ones(1, BATCH)
    normal = kernels.topk_unpack_normalised(*stored, mean, rstd, n, N, "none", torch.float16)
    assert_same_bits("normalised", normal[:, last:], dense[:, last:])
