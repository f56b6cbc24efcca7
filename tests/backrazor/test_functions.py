"""Functions that a module calls by itself go to the razored operators, whatever the module's class."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import backrazor as br
from backrazor import functional
from backrazor.codecs import Pruned, pack
from backrazor.convert import status_of
from tests.backrazor.compare import assert_close, assert_same_bits

# as exact as each rule can be, and no net, so that what is met is met by an operator
NEAR = br.RazorConfig(0.0, values="float32", norm="int8", activation="int8", attention="int8", rest="dense")
CAUSAL = torch.ones(12, 12, dtype=torch.bool).tril()


class Calls(nn.Module):
    """Calls ``function(x, weights)`` on x through a Linear; ``shapes`` are those of the weights."""

    def __init__(self, function, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.function = nn.Linear(16, 16), function
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape) / 4 + (len(shape) == 1)) for shape in shapes)
        self.register_buffer("mean", torch.linspace(-0.2, 0.2, 12))
        self.register_buffer("var", torch.linspace(0.8, 1.4, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x), list(self.weights))


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def sdpa(q: int, kv: int, **options):
    def call(x: Tensor, weights: list[Tensor]) -> Tensor:
        key, value = (x @ w for w in weights[:2])
        return F.scaled_dot_product_attention(heads(x, q), heads(key, kv), heads(value, kv), **options)

    return call, (16, 4 * kv), (16, 4 * kv)


CASES = {
    "gelu": (lambda x, w: F.gelu(x),),
    "gelu, tanh": (lambda x, w: F.gelu(x, approximate="tanh"),),
    "silu": (lambda x, w: F.silu(x * 1, inplace=True),),
    "hardswish": (lambda x, w: F.hardswish(x),),
    "relu": (lambda x, w: F.relu(x) + torch.relu(x) + x.relu() + (x * 1).relu_(),),
    "relu6": (lambda x, w: F.relu6(4 * x),),
    "dropout": (lambda x, w: F.dropout(x, 0.3),),
    "linear": (lambda x, w: F.linear(x, *w), (5, 16), (5,)),
    "addmm": (lambda x, w: torch.addmm(w[0], x.view(-1, 16), w[1]), (5,), (16, 5)),
    "layer_norm": (lambda x, w: F.layer_norm(x, (16,), *w), (16,), (16,)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (16,), *w), (16,)),
    "group_norm": (lambda x, w: F.group_norm(x, 3, *w), (12,), (12,)),
    "batch_norm": (lambda x, w: F.batch_norm(x, None, None, *w, training=True), (12,), (12,)),
    "conv1d": (lambda x, w: F.conv1d(x, *w, 2, padding=1, dilation=2), (6, 12, 3), (6,)),
    "conv1d, groups": (lambda x, w: F.conv1d(x, w[0], groups=4, padding="valid"), (8, 3, 3)),
    "conv2d": (lambda x, w: F.conv2d(x[:, None], w[0], stride=(1, 2)), (3, 1, 2, 3)),
    "conv3d": (lambda x, w: F.conv3d(x.view(3, 2, 6, 4, 4), w[0], padding=(1, 0, 1)), (3, 2, 3, 2, 2)),
    "conv_transpose1d": (
        lambda x, w: F.conv_transpose1d(x, *w, stride=2, output_padding=1, groups=2),
        (12, 3, 3),
        (6,),
    ),
    "conv_transpose2d": (lambda x, w: F.conv_transpose2d(x[:, None], w[0], padding=1), (1, 2, 3, 3)),
    "conv_transpose3d": (lambda x, w: F.conv_transpose3d(x.view(3, 2, 6, 4, 4), w[0], stride=2), (2, 3, 2, 2, 2)),
    "attention": sdpa(4, 4),
    "attention, causal": sdpa(4, 4, is_causal=True),
    "attention, grouped": sdpa(4, 2, enable_gqa=True, is_causal=True),
    "attention, one head for all": sdpa(4, 1),
    "attention, bool mask": sdpa(4, 4, attn_mask=CAUSAL),
    "attention, float mask and scale": sdpa(4, 4, attn_mask=torch.linspace(-1, 1, 144).view(12, 12), scale=0.3),
    "attention, a mask that learns": (
        lambda x, w: F.scaled_dot_product_attention(heads(x, 4), heads(x, 4), heads(x @ w[0], 4), w[1]),
        (16, 16),
        (4, 12, 12),
    ),
    "attention, three dimensions": (lambda x, w: F.scaled_dot_product_attention(x, x @ w[0], x), (16, 16)),
    "attention, five dimensions": (
        lambda x, w: F.scaled_dot_product_attention(*[(x @ m).view(3, 2, 2, 6, 8) for m in w], CAUSAL[:6, :6]),
        *[(16, 16)] * 3,
    ),
}


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    torch.manual_seed(7)
    out = model(x)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return out, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("name", CASES)
def test_output_in_bits_and_gradients_near(name: str) -> None:
    torch.manual_seed(0)
    plain, x = Calls(*CASES[name]), torch.randn(3, 12, 16)
    ours = copy.deepcopy(plain)
    br.razor_(ours, NEAR)
    (expected, theirs), (got, mine) = step(plain, x), step(ours, x)
    assert_same_bits("output", got, expected)
    for a, b in zip(mine, theirs, strict=True):
        assert F.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.999
    br.unrazor_(ours)
    for a, b in zip(step(ours, x)[1], theirs, strict=True):
        assert_same_bits("gradient", a, b)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("linear", "addmm")])
def test_nothing_is_kept_dense(name: str) -> None:
    """Through an operator it is packed, which in PyTorch it is not: x once less at least."""
    torch.manual_seed(0)
    model, x = Calls(*CASES[name]), torch.randn(3, 12, 16)
    held = []
    for config in (None, br.RazorConfig(0.5, rest="dense")):
        if config is not None:
            br.razor_(model, config, filter_fn=lambda name, module: True)
        with br.memory.ledger(model) as book:
            out = model(x).sum()
        held.append(sum(row.bytes for row in book.rows if row.module == ""))
        del out
    assert held[1] < held[0], name


def test_dropout_in_attention_draws_as_the_formula_does() -> None:
    torch.manual_seed(0)
    model, x = Calls(*sdpa(4, 4, dropout_p=0.3)), torch.randn(3, 12, 16)
    br.razor_(model, NEAR)
    out, gradients = step(model, x)
    again, same = step(model, x)
    assert_same_bits("output", out, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))


def test_long_sequences_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads, and queries of one head, one after the other give what all of them at once do."""
    torch.manual_seed(0)
    model, x = Calls(*sdpa(4, 2, is_causal=True, enable_gqa=True)), torch.randn(3, 12, 16)
    br.razor_(model, NEAR)
    whole = step(model, x)[1]
    for limit in (12 * 12 * 4 * 2, 12 * 4 * 5):
        monkeypatch.setattr(functional.common, "CHUNK_BYTES", limit)
        for a, b in zip(step(model, x)[1], whole, strict=True):
            assert_close("gradient", a, b, 1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_differentiate_at_what_was_kept(dims: int, transposed: bool, flag: Tensor) -> None:
    dense = getattr(F, f"conv_transpose{dims}d" if transposed else f"conv{dims}d")
    x = torch.randn(3, 4, *(7, 6, 5)[:dims], dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 2, *(3, 2, 2)[:dims], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    spec = functional.ConvNdSpec((2,) * dims, (1,) * dims, (1,) * dims, transposed, (0,) * dims, 2)
    codec = Pruned(0.7, "float32")

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return dense(x, weight, bias, stride=2, padding=1, groups=2)

    out = functional.conv_nd(x, weight, bias, spec, call, codec, flag)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, (x, weight, bias), grad)
    x_hat = pack(x.detach(), codec, flag).unpack()
    _, pull = torch.func.vjp(call, x_hat, weight, bias)
    for name, a, b in zip(("x", "weight", "bias"), got, pull(grad), strict=True):
        assert_close(name, a, b, 1e-12)


def test_losses_and_foreign_functions_see_their_own_tensors() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return F.cross_entropy(self.inner(x), torch.arange(64))

    torch.manual_seed(0)
    plain, x = Loss(), torch.randn(64, 64)
    ours = copy.deepcopy(plain)
    br.razor_(ours, br.RazorConfig(0.0, values="float32"))
    for model in (plain, ours):
        model(x).backward()
    assert_same_bits("gradient", ours.inner.weight.grad, plain.inner.weight.grad)


def test_attention_without_a_form_runs_as_it_is() -> None:
    """A batch of one for all queries: PyTorch broadcasts it."""
    torch.manual_seed(0)
    plain = Calls(lambda x, w: F.scaled_dot_product_attention(x[:, None], x[:1, None], x[:1, None]))
    ours, x = copy.deepcopy(plain), torch.randn(3, 12, 16)
    br.razor_(ours, br.RazorConfig(0.0, values="float32"))
    for a, b in zip(step(ours, x)[1], step(plain, x)[1], strict=True):
        assert_same_bits("gradient", a, b)
    with pytest.raises(RuntimeError):
        ours.function = lambda x, w: F.scaled_dot_product_attention(x, x, x, CAUSAL, is_causal=True)
        ours(x)


def test_not_a_number_is_not_hidden() -> None:
    model = Calls(lambda x, w: torch.sigmoid(x) * x)
    br.razor_(model, br.RazorConfig(0.0, values="float32"))
    x = torch.randn(64, 16)
    x[3, 2] = math.nan
    model(x).sum().backward()
    assert model.first.weight.grad.isnan().any()


def test_bad_numbers_that_a_function_packs_stop_the_step() -> None:
    """Both ways to ask see them: the one that reads the device, and the one for steps that must not."""
    model = Calls(lambda x, w: F.linear(x * math.inf, *w), (5, 16), (5,))
    br.razor_(model, NEAR)
    assert status_of(model).item() == 0
    model(torch.rand(8, 16) + 1).sum().backward()
    assert status_of(model).item() != 0
    with pytest.raises(FloatingPointError, match="NaN or Inf in the input of Calls"):
        br.check_finite(model)
    assert status_of(model).item() == 0
