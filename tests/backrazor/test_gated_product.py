"""Gated products: both factors in few bits, and the Linear behind reads its input from them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import backrazor as br
from backrazor.codecs import Ranged
from tests.backrazor.compare import assert_close, assert_same_bits

WIDTH, INNER, TOKENS = 48, 172, 17  # runs of 86 elements


class Gated(nn.Module):
    """A gated MLP under a head, so that its last Linear is no classifier."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down, self.head = nn.Linear(INNER, WIDTH), nn.Linear(WIDTH, 3)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.act(self.gate(x)) * self.up(x)))


def razored(plain: nn.Module, **settings: object) -> nn.Module:
    ours = copy.deepcopy(plain)
    br.razor_(ours, br.RazorConfig(0.97, **settings))
    return ours


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def rows_of(model: nn.Module, x: Tensor) -> dict[str, list[int]]:
    """Saved bytes by module and role."""
    with br.memory.ledger(model) as book:
        loss = model(x).sum()
    del loss
    found: dict[str, list[int]] = {}
    for row in book.rows:
        found.setdefault(f"{row.module}: {row.role}", []).append(row.bytes)
    return found


@pytest.fixture
def plain() -> Gated:
    torch.manual_seed(0)
    return Gated()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 64), (3, 17, 172), (2, 5, 7, 96), (4, 30, 15, 8), (2, 3, 1000)], ids=str)
@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e3])
def test_no_element_is_further_off_than_half_a_step(
    bits: int, dtype: torch.dtype, shape: tuple[int, ...], scale: float
) -> None:
    torch.manual_seed(0)
    x = (F.silu(torch.randn(shape)) * scale).to(dtype)
    packed = Ranged(bits).pack(x)
    runs = x.float().view(-1, packed.form.run)
    low, high = runs.aminmax(dim=1, keepdim=True)
    step = (high - low) / (2 ** (bits - 1) - 1) / 2
    slack = torch.finfo(torch.bfloat16).eps * high.abs().maximum(low.abs())  # of the middle, and of a 16-bit sum
    x_hat = packed.unpack().float().view_as(runs)
    assert ((x_hat - runs).abs() <= step * 0.52 + slack).all()
    assert torch.equal(packed.unpack(1, 2), packed.unpack()[1:2])
    bytes_per_run = packed.form.run * bits / 8 + 4
    assert sum(t.nbytes for t in packed.tensors) == bytes_per_run * x.numel() / packed.form.run


def test_what_has_no_even_runs_does_not_fit() -> None:
    assert not Ranged(4).fits(torch.zeros(8, 7, 31))
    assert not Ranged(4).fits(torch.zeros(2, 64))  # too small to be worth it
    assert Ranged(4).fits(torch.zeros(8, 31, 32))
    assert Ranged(4).fits(torch.zeros(8, 32, 31))


@pytest.mark.parametrize(
    "act", [F.silu, F.gelu, F.relu, nn.SiLU(), nn.Hardswish()], ids=["silu", "gelu", "relu", "SiLU", "Hardswish"]
)
def test_the_gradients_are_those_at_the_kept_factors(act: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    plain, x = Gated(act), torch.randn(3, TOKENS, WIDTH)
    ours = razored(plain)
    assert_same_bits("forward", ours(x), plain(x))
    caught: dict[str, Tensor] = {}
    for name in ("down", "up"):

        def catch(module: nn.Module, inputs: tuple, out: Tensor, name: str = name) -> None:
            out.register_hook(lambda grad: caught.update({name: grad}))

        ours.get_submodule(name).register_forward_hook(catch)
    found = gradients(ours, x)
    with torch.no_grad():
        a, b = act(plain.gate(x)), plain.up(x)
        a_hat, b_hat = (Ranged(4).pack(part).unpack() for part in (a, b))
        behind = caught["down"] @ plain.down.weight
    assert_close("down.weight", found["down.weight"], torch.einsum("bno,bni->oi", caught["down"], a_hat * b_hat), 1e-5)
    assert_close("gradient of up", caught["up"], behind * a_hat, 1e-5)
    dense = gradients(plain, x)
    assert F.cosine_similarity(found["down.weight"].flatten(), dense["down.weight"].flatten(), dim=0) > 0.98


def test_the_layer_behind_keeps_nothing_and_the_prediction_says_so(plain: Gated) -> None:
    x = torch.randn(3, TOKENS, WIDTH)
    ours = razored(plain)
    rows = rows_of(ours, x)
    assert not [name for name in rows if name.startswith("down")]
    elements = 3 * TOKENS * INNER
    assert sum(rows[": quantised"]) == (2 + 1) * elements // 2  # both factors, and SiLU's derivative
    assert sum(rows[": scales"]) == sum(rows[": means"]) == 2 * 2 * elements // 86
    predicted = br.memory.predict(ours, (TOKENS, WIDTH), 3, loss_fn=torch.sum).saved_bytes
    assert predicted == sum(map(sum, rows.values()))


def test_the_words_of_the_setting(plain: Gated) -> None:
    x = torch.randn(3, TOKENS, WIDTH)
    elements = 3 * TOKENS * INNER
    assert sum(rows_of(razored(plain, gate="int8"), x)[": quantised"]) == 2 * elements + elements // 2
    rest = rows_of(razored(plain, gate="rest"), x)
    assert sum(rest[": quantised"]) == 2 * elements + elements // 2 and "down: pruned values" in rest
    dense = rows_of(razored(plain, gate="rest", rest="dense"), x)
    assert sum(dense[": dense"]) >= 2 * 4 * elements
    assert br.RazorConfig.paper(0.9).gate == "rest"
    with pytest.raises(ValueError, match="gate='int2' is not known: use one of rest, int8, int4"):
        br.RazorConfig(gate="int2")


def test_a_frozen_factor_is_kept_alone(plain: Gated) -> None:
    for parameter in plain.up.parameters():
        parameter.requires_grad_(False)
    ours, x = razored(plain), torch.randn(3, TOKENS, WIDTH)
    rows = rows_of(ours, x)
    # of ``up``, and SiLU's derivative; nothing needs the gate's
    assert sum(rows[": quantised"]) == 2 * 3 * TOKENS * INNER // 2
    assert "down: pruned values" in rows
    model, dense = ours(x).square().sum(), plain(x).square().sum()
    model.backward()
    dense.backward()
    got, expected = ours.gate.bias.grad, plain.gate.bias.grad
    assert F.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.97


def test_other_products_are_left_alone() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return F.silu(y).exp() * y + F.silu(y) * y[:, :1]  # no activation's output, and not of its shape

    x = torch.randn(4, 33, 64)
    model = Products()
    ours = razored(model, activation="int8")
    assert ": means" not in rows_of(ours, x)
    got, expected = (gradients(net, x)["first.bias"] for net in (ours, model))
    assert F.cosine_similarity(got, expected, dim=0) > 0.999


def test_a_product_that_changed_since_is_packed_as_it_is(plain: Gated) -> None:
    plain.down.register_forward_pre_hook(lambda module, inputs: (inputs[0].mul_(2),))
    ours, x = razored(plain), torch.randn(3, TOKENS, WIDTH)
    assert_same_bits("forward", ours(x), plain(x))
    assert "down: pruned values" in rows_of(ours, x)


def test_checkpointing_recomputes_the_same(plain: Gated) -> None:
    ours, x = razored(plain), torch.randn(3, TOKENS, WIDTH)
    wanted = gradients(ours, x)
    ours.zero_grad()
    checkpoint(ours, x, use_reentrant=False).square().sum().backward()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, wanted[name]), name


def test_a_number_that_is_not_finite_is_told(plain: Gated) -> None:
    ours, x = razored(plain), torch.randn(3, TOKENS, WIDTH)
    with torch.no_grad():
        ours.up.bias[3] = torch.inf
    ours(x).sum().backward()
    with pytest.raises(FloatingPointError):
        br.check_finite(ours)
