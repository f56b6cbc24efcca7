"""Layers of one's own: ``register``, from outside the package, with what its users may import only."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import backrazor as br
from backrazor import functional
from backrazor.codecs import Pruned
from backrazor.nn import DropIn, LayerRules, Registration
from backrazor.nn.attention import SdpaDropIn
from backrazor.nn.linear import RazorLinear
from examples.own_layer import GatedUnit, RazorGatedUnit
from tests.backrazor.compare import assert_close, assert_same_bits

ROOT = Path(__file__).resolve().parents[2]


class Scaled(nn.Linear):
    """A Linear whose rows have length one."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, F.normalize(self.weight, dim=1), self.bias)


class RazorScaled(DropIn, Scaled):
    prunes = True

    @classmethod
    def refusal(cls, module: nn.Module, rules: LayerRules) -> str | None:
        return "too small to pay" if module.in_features < 8 else None

    def forward(self, input: Tensor) -> Tensor:
        weight = F.normalize(self.weight, dim=1)
        return functional.linear(input, weight, self.bias, self.razor.pruned, self.flag_for(input))


class Heads(nn.Module):
    """Attention of one's own, by PyTorch's function."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class RazorHeads(SdpaDropIn, Heads):
    pass


@pytest.fixture
def registered() -> Iterator[Registration]:
    with br.register(Scaled, RazorScaled) as handle:
        yield handle


def network() -> nn.Sequential:
    return nn.Sequential(Scaled(16, 32), nn.ReLU(), nn.Linear(32, 4))


def test_a_registered_layer_is_converted_and_turned_back(registered: Registration) -> None:
    plain, x = network(), torch.randn(6, 16)
    ours = copy.deepcopy(plain)
    report = br.razor_(ours, br.RazorConfig(0.75, values="float32", fill="zero"))
    assert (report.replaced[0].original, report.replaced[0].replacement) == ("Scaled", "RazorScaled")
    assert type(ours[0]) is RazorScaled and list(ours.state_dict()) == list(plain.state_dict())
    with br.memory.ledger(ours) as book:
        out = ours(x)
    assert "pruned values" in {row.role for row in book.rows if row.module == "0"}
    assert_same_bits("forward", out, plain(x))
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, ours[0].weight, grad)[0]
    mask = Pruned(0.75, "float32").form(x).keep
    kept = x * (x.abs() >= x.abs().sort(dim=1, descending=True).values[:, mask - 1 : mask])
    hidden = plain[0](x)
    inner = (grad @ plain[2].weight) * (hidden > 0)
    leaf = plain[0].weight.detach().requires_grad_()
    (expected,) = torch.autograd.grad(F.linear(kept, F.normalize(leaf, dim=1)), leaf, inner)
    assert_close("weight", got, expected, 1e-5)
    assert br.unrazor_(ours) == 3
    assert type(ours[0]) is Scaled


def test_its_refusal_is_reported(registered: Registration) -> None:
    report = br.razor_(nn.Sequential(Scaled(4, 16), nn.Linear(16, 4)))
    assert [(row.name, row.reason) for row in report.left] == [("0", "too small to pay")]


def test_later_registrations_are_seen_and_removed_ones_are_not() -> None:
    model = network()
    assert [row.name for row in br.razor_(model).left] == ["0"]
    handle = br.register(Scaled, RazorScaled)
    try:
        assert [row.name for row in br.razor_(model).replaced] == ["0", "1", "2"]
    finally:
        handle.remove()
    handle.remove()  # again is no error
    assert type(model[0]) is RazorScaled  # what is converted stays
    assert br.unrazor_(model) == 3 and type(model[0]) is Scaled
    assert [row.name for row in br.razor_(model).left] == ["0"]


def test_a_block_ends_its_registration() -> None:
    with br.register(Scaled, RazorScaled):
        assert br.nn.drop_in_of(Scaled) is RazorScaled
    assert br.nn.drop_in_of(Scaled) is None


def test_an_old_handle_does_not_remove_a_newer_registration() -> None:
    class Other(DropIn, Scaled):
        pass

    old = br.register(Scaled, RazorScaled)
    old.remove()
    with br.register(Scaled, Other):
        old.remove()
        assert br.nn.drop_in_of(Scaled) is Other


def test_the_class_decides_and_not_its_name() -> None:
    """A notebook cell that runs again makes another class of the same name."""

    def cell() -> tuple[type[nn.Module], type[DropIn]]:
        class Own(nn.Linear):
            pass

        class RazorOwn(RazorLinear, Own):
            link = None

        return Own, RazorOwn

    (first, razor_first), (second, razor_second) = cell(), cell()
    with br.register(first, razor_first), br.register(second, razor_second):
        model = nn.Sequential(first(8, 8), second(8, 8))
        br.razor_(model)
        assert [type(layer) for layer in model] == [razor_first, razor_second]


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
@pytest.mark.parametrize("build", [network, lambda: nn.Sequential(Heads(16), nn.Linear(16, 4))], ids=["own", "heads"])
def test_copies_need_no_registration(copied: Callable, build: Callable) -> None:
    model = build()
    with br.register(Scaled, RazorScaled), br.register(Heads, RazorHeads):
        br.razor_(model, br.RazorConfig(0.5))
    other, x = copied(model), torch.randn(3, 5, 16)
    assert isinstance(other[0], DropIn) and type(other[0]) is type(model[0])
    for each in (model, other):
        each(x).square().sum().backward()
    for (name, mine), its in zip(model.named_parameters(), other.parameters(), strict=True):
        assert_same_bits(name, mine.grad, its.grad)
    br.unrazor_(other)
    assert not any(isinstance(module, DropIn) for module in other.modules())


def test_a_model_of_another_process_needs_no_registration(tmp_path: Path) -> None:
    model = nn.Sequential(GatedUnit(16, 8), nn.Linear(8, 2))
    with br.register(GatedUnit, RazorGatedUnit):
        br.razor_(model)
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys, torch, backrazor; model = torch.load(sys.argv[1], weights_only=False);"
        "print(type(model[0]).__name__, backrazor.unrazor_(model), type(model[0]).__name__)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
    paths = {"PYTHONPATH": f"{ROOT}/src:{ROOT}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=paths, capture_output=True, text=True)
    assert done.stdout.split() == ["RazorGatedUnit", "4", "GatedUnit"], done.stderr


def test_kept_energy_passes_over_a_layer_without_a_weight() -> None:
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.sigmoid()

    class RazorGate(DropIn, Gate):
        prunes = True

        def forward(self, x: Tensor) -> Tensor:
            return functional.channel_scale(x, x.sigmoid(), self.razor.pruned, self.flag_for(x))

    model = nn.Sequential(nn.Linear(16, 16), Gate())
    with br.register(Gate, RazorGate):
        assert len(br.razor_(model).replaced) == 2
    with br.kept_energy(model) as energy:
        loss = model(torch.randn(3, 16)).sum()
    loss.backward()
    assert [row.module for row in energy.rows] == ["0"]


def test_attention_of_ones_own() -> None:
    plain, x = nn.Sequential(Heads(16), nn.Linear(16, 4)), torch.randn(3, 5, 16)
    ours = copy.deepcopy(plain)
    with br.register(Heads, RazorHeads):
        report = br.razor_(ours, br.RazorConfig(0.9, attention="int8"))
    assert "q, k and v of attention are stored in int8" in report.lowered
    with br.memory.ledger(ours) as book:
        out = ours(x)
    assert {row.role for row in book.rows if row.module == "0"} >= {"quantised"}
    assert_close("forward", out, plain(x), 1e-5)


def test_a_layer_that_was_parametrized_since_comes_back(registered: Registration) -> None:
    model = network()
    br.razor_(model, br.RazorConfig(0.5))
    parametrize.register_parametrization(model[0], "bias", nn.Identity())
    assert br.unrazor_(model) == 3
    assert isinstance(model[0], Scaled) and not isinstance(model[0], DropIn)
    assert parametrize.is_parametrized(model[0], "bias")


def test_a_layer_of_its_class_is_a_plain_one(registered: Registration) -> None:
    assert type(RazorScaled(8, 8)) is Scaled


def test_the_message_of_a_model_without_layers_names_registered_ones(registered: Registration) -> None:
    with pytest.raises(ValueError, match="Scaled"):
        br.razor_(nn.Sequential(nn.Sigmoid()))


class WrongOrder(Scaled, DropIn):
    pass


class WithInit(DropIn, Scaled):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)


class InChains(RazorLinear, Scaled):
    pass


@pytest.mark.parametrize(
    ("layer", "drop_in", "error", "words"),
    [
        (Scaled(2, 2), RazorScaled, TypeError, "takes two classes"),
        ("Scaled", RazorScaled, TypeError, "'Scaled'"),
        (Scaled, lambda: None, TypeError, "takes two classes"),
        (int, RazorScaled, TypeError, "int"),
        (RazorScaled, RazorScaled, TypeError, "plain layer"),
        (Scaled, Scaled, TypeError, "no subclass of both DropIn and Scaled"),
        (Heads, RazorScaled, TypeError, "no subclass of both DropIn and Heads"),
        (Scaled, DropIn, TypeError, "no subclass of both"),
        (Scaled, WrongOrder, TypeError, "names DropIn after Scaled"),
        (Scaled, WithInit, TypeError, "has an __init__"),
        (Scaled, InChains, ValueError, "link = None"),
        (nn.Linear, type("Own", (RazorLinear,), {"link": None}), ValueError, "already, RazorLinear"),
    ],
)
def test_what_is_no_drop_in_is_refused_in_one_line(
    layer: object, drop_in: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as caught:
        br.register(layer, drop_in)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_second_registration_is_refused(registered: Registration) -> None:
    class Other(DropIn, Scaled):
        pass

    with pytest.raises(ValueError, match=r"already, RazorScaled: remove\(\)"):
        br.register(Scaled, Other)
