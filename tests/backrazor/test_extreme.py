"""The largest and smallest along dimensions: one bit per element, and PyTorch's own gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import backrazor as br
from backrazor import functional
from backrazor.codecs import Pruned, kept_count, pack
from tests.backrazor.compare import assert_close, assert_same_bits


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dims", [(1,), (-1,), (2, 3), (0, 2), ()], ids=str)
@pytest.mark.parametrize("keepdim", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_it_equals_pytorch(largest: bool, dims: tuple, keepdim: bool, dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(0)
    x = torch.randint(-3, 3, (4, 6, 5, 7)).to(dtype)  # many are equally large
    x = {"contiguous": x, "channels_last": x.to(memory_format=torch.channels_last), "transposed": x.transpose(1, 3)}[
        layout
    ]
    name = "amax" if largest else "amin"
    plain, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = getattr(plain, name)(dims, keepdim)
    got = functional.extreme(ours, dims, keepdim, largest)
    assert_same_bits("forward", got, expected)
    grad = torch.randn(expected.shape, dtype=dtype)
    expected.backward(grad)
    got.backward(grad)
    assert_same_bits("gradient", ours.grad, plain.grad)


class Pooled(nn.Module):
    """Tokens through a Linear, and the largest of four."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(32, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).view(len(x), 4, -1, 64).amax(dim=1).mean(1))


def test_a_model_that_calls_it_keeps_one_bit() -> None:
    plain, x = Pooled(), torch.randn(2, 64, 32)
    ours = copy.deepcopy(plain)
    br.razor_(ours, br.RazorConfig(0.9))
    with br.memory.ledger(ours) as book:
        out = ours(x)
    assert [row.bytes for row in book.rows if row.module == "" and row.role == "mask bits"] == [2 * 64 * 64 // 8]
    assert not [row for row in book.rows if row.module == "" and row.role in ("dense", "quantised")]
    assert_same_bits("forward", out, plain(x))
    out.sum().backward()
    plain(x).sum().backward()
    assert_same_bits("bias", ours.first.bias.grad, plain.first.bias.grad)


@pytest.mark.parametrize("named", [{"axis": 1}, {"axis": 1, "keepdims": True}, {"dim": 1, "keepdim": True}], ids=str)
def test_numpys_names_are_taken(named: dict) -> None:
    class Model(Pooled):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.amax(self.first(x), **named)).sum()

    plain, x = Model(), torch.randn(2, 64, 32)
    ours = copy.deepcopy(plain)
    br.razor_(ours, br.RazorConfig(0.9))
    assert_same_bits("forward", ours(x), plain(x))
    for model in (ours, plain):
        model(x).backward()
    assert_same_bits("bias", ours.first.bias.grad, plain.first.bias.grad)


def test_products_by_their_other_names() -> None:
    class Model(Pooled):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x).flatten(0, 1)
            return self.head(y.mm(mat2=y.t() @ y) + torch.mul(input=y, other=y)).sum()

    plain, x = Model(), torch.randn(2, 64, 32)
    ours = copy.deepcopy(plain)
    br.razor_(ours, br.RazorConfig(0.9))
    assert_same_bits("forward", ours(x), plain(x))


class Written(nn.Module):
    """A Linear written as a product, as Falcon's is, and a scale of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(48, 32) / 8), nn.Parameter(torch.ones(1))
        self.head = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x @ self.weight.T) * self.scale)


def x_hat_of(x: Tensor) -> Tensor:
    return pack(x, Pruned(0.8, "float32", "auto"), torch.zeros(1, dtype=torch.int32)).unpack()


def test_a_product_with_a_transposed_weight_is_a_linear() -> None:
    torch.manual_seed(0)
    plain, x = Written(), torch.randn(2, 65, 32)
    ours = copy.deepcopy(plain)
    br.razor_(ours, br.RazorConfig(0.8, fill="zero", values="float32"))
    with br.memory.ledger(ours) as book:
        out = ours(x)
    # the input of the weight, and that of the scale
    kept = 2 * (kept_count(65 * 32, 0.8) + kept_count(65 * 48, 0.8))
    assert [row.bytes for row in book.rows if row.role == "pruned values" and row.module == ""] == [4 * kept]
    assert_same_bits("forward", out, plain(x))
    grad = torch.randn_like(out)
    out.backward(grad)
    with torch.no_grad():
        y, behind = x @ plain.weight.T, grad @ plain.head.weight
        expected = torch.einsum("bno,bni->oi", behind.double(), x_hat_of(x).double())
        assert_close("weight", ours.weight.grad, expected, 1e-5)
        assert_close("scale", ours.scale.grad, (behind.double() * x_hat_of(y).double()).sum().view(1), 1e-5)


class Pools(nn.Module):
    """Calls the pooling functions by itself, of a map in channels_last behind a view with gaps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 24, 3, padding=1), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).permute(0, 2, 3, 1)[..., :12].permute(0, 3, 1, 2)
        y = F.max_pool2d(y, 2) + F.max_pool2d(y, 3, 2, padding=1)
        y = F.avg_pool2d(y, 3, 1, padding=1, count_include_pad=False) + F.adaptive_avg_pool2d(y, (4, 4)).mean()
        return self.head(y.mean((2, 3)))


def test_pooling_functions_keep_what_the_layers_keep() -> None:
    torch.manual_seed(0)
    plain, x = Pools(), torch.randn(2, 3, 16, 16)
    ours = copy.deepcopy(plain)
    br.razor_(ours, br.RazorConfig(0.0, values="float32", fill="zero"))
    with br.memory.ledger(ours) as book:
        out = ours(x)
    own = [row for row in book.rows if row.module == ""]
    assert sum(row.bytes for row in own if row.role == "index") == 2 * 2 * 12 * 8 * 8  # a byte per output
    assert not [row for row in own if row.role in ("dense", "quantised")]
    assert_same_bits("forward", out, plain(x))
    out.sum().backward()
    plain(x).sum().backward()
    for (name, got), expected in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert_close(name, got.grad, expected.grad, 1e-5)


def test_max_pooling_lies_as_pytorchs_does() -> None:
    """Attention's kernel rounds by how its queries lie, so that a pooled map has to lie as it would."""
    x = torch.randn(2, 8, 8, 24)[..., :12].permute(0, 3, 1, 2)
    for y in (x, x.contiguous(), x.contiguous(memory_format=torch.channels_last)):
        got = functional.max_pool(y.detach().requires_grad_(), (2, 2), (2, 2), (0, 0), (1, 1), False)
        assert got.stride() == F.max_pool2d(y, 2).stride()
