"""Tokens of zeros, such as padding: what stands for them in backward is zero, not a guess."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import backrazor as br
from backrazor.codecs import Pruned
from backrazor.codecs.guessed import Guessed
from tests.backrazor.compare import assert_close

TOKENS, WIDTH = 33, 48


def padded(dtype: torch.dtype = torch.float32, first: float = 1.0) -> torch.Tensor:
    """(3, TOKENS, WIDTH) whose last tokens are zero; ``first``: what the others' first feature is."""
    torch.manual_seed(0)
    x = torch.randn(3, TOKENS, WIDTH) + 2  # a mean that is far from zero
    x[..., 0] = first
    x[0, -5:] = x[2, 3] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [1.0, 0.0])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_they_stay_zero(dtype: torch.dtype, first: float, sparsity: float) -> None:
    x = padded(dtype, first)
    packed = Guessed(Pruned(sparsity, "int4", "auto", "known"), True).pack(x, torch.zeros(1, dtype=torch.int32))
    x_hat = packed.unpack()
    zero = x.eq(0).all(-1)
    assert torch.equal(x_hat.eq(0).all(-1), zero)
    assert packed.tensors[-1].nbytes == 3 * -(-TOKENS // 8)
    assert torch.equal(packed.unpack(1, 3), x_hat[1:])


@pytest.mark.parametrize("sparsity", [0.5, 0.9], ids=["a dense product", "a sum over what is kept"])
def test_a_gradient_of_any_size_there_is_not_let_in(sparsity: float) -> None:
    layer, x = nn.Sequential(nn.Linear(WIDTH, 32), nn.Linear(32, 2)), padded()
    br.razor_(layer, br.RazorConfig(sparsity))
    out = layer[0](x)
    grad = torch.randn_like(out)
    clean = grad.masked_fill(x.eq(0).all(-1, keepdim=True), 0)
    huge = grad.where(clean != 0, 1e12)
    found = [torch.autograd.grad(out, layer[0].weight, g, retain_graph=True)[0] for g in (clean, huge)]
    assert_close("weight", found[1], found[0], 1e-6)


class Cosine(nn.Module):
    """Attention scores of normalised queries and keys, as in Swin v2: the gradient behind a zero token is divided by
    the smallest norm, 1e-12."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.head = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.qk(x).chunk(2, dim=-1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(1, 2)
        return self.head(scores.softmax(-1) @ x)


def test_padding_behind_a_norm_does_not_blow_up() -> None:
    torch.manual_seed(0)
    model, x = Cosine(), padded()
    model(x).square().sum().backward()
    expected = model.qk.weight.grad.clone()
    model.zero_grad()
    br.razor_(model, br.RazorConfig(0.9))
    model(x).square().sum().backward()
    assert 0.5 < model.qk.weight.grad.norm() / expected.norm() < 2
