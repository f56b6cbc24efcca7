"""Different settings for different layers: ``razor_`` with a dict of patterns, and ``razor_`` called again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import backrazor as br
from backrazor.nn.base import DropIn
from backrazor.nn.fusion import Linked
from tests.backrazor.networks import mlp

LOW, HIGH = br.RazorConfig(0.9), br.RazorConfig(0.97)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x + self.attn(x))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x))


def sparsities(model: nn.Module) -> dict[str, float | None]:
    """Of each Linear; None where it is dense."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {name: m.razor.pruned.sparsity if isinstance(m, DropIn) else None for name, m in linears}


def test_the_first_pattern_that_matches_decides() -> None:
    model = Network()
    report = br.razor_(model, {"blocks.*.mlp.*": HIGH, "head": None, "*": LOW})
    expected = {
        f"blocks.{i}.{part}": s for i in (0, 1) for part, s in (("attn", 0.9), ("mlp.0", 0.97), ("mlp.2", 0.97))
    }
    assert sparsities(model) == {**expected, "head": None}
    rows = {row.name: row for row in report.replaced}
    assert (rows["blocks.1.mlp.0"].config, rows["blocks.1.mlp.0"].pattern) == (HIGH, "blocks.*.mlp.*")
    assert (rows["blocks.1.attn"].config, rows["blocks.1.attn"].pattern) == (LOW, "*")
    assert [(row.name, row.reason) for row in report.left] == [("head", "left out by the pattern 'head'")]
    table = report.table()
    for line in ("  'blocks.*.mlp.*': sparsity=0.97", "  'head': dense", "  '*': sparsity=0.9,"):
        assert line in table
    assert "4 x Linear by 'blocks.*.mlp.*': keeps input at sparsity 0.97" in table
    assert "2 x Linear by '*': keeps input at sparsity 0.9" in table


def test_the_order_of_the_dict_counts() -> None:
    model = Network()
    br.razor_(model, {"blocks.0.*": HIGH, "blocks.*": LOW})
    assert sparsities(model)["blocks.0.mlp.0"] == 0.97
    br.razor_(model, {"blocks.*.mlp.*": LOW, "blocks.0.*": HIGH, "*": br.RazorConfig(0.5)})
    assert sparsities(model) == {
        "blocks.0.attn": 0.97,
        "blocks.0.mlp.0": 0.9,
        "blocks.0.mlp.2": 0.9,
        "blocks.1.attn": 0.5,
        "blocks.1.mlp.0": 0.9,
        "blocks.1.mlp.2": 0.9,
        "head": 0.5,
    }


def test_what_no_pattern_matches_is_dense_and_reported() -> None:
    model = Network()
    report = br.razor_(model, {"blocks.*": LOW})
    assert sparsities(model)["head"] is None
    assert [(row.name, row.reason) for row in report.left] == [("head", "no pattern matches it")]


def test_patterns_are_those_of_fnmatchcase() -> None:
    model = Network()
    br.razor_(model, {"blocks.[!0].mlp.?": LOW})
    assert [name for name, sparsity in sparsities(model).items() if sparsity] == ["blocks.1.mlp.0", "blocks.1.mlp.2"]
    with pytest.raises(ValueError, match=r"'HEAD' matches no module"):
        br.razor_(Network(), {"HEAD": LOW, "*": LOW})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"block.*": HIGH, "*": LOW},
            "'block.*' matches no module: use names of model.named_modules(), such as 'head'",
        ),
        ({"*": LOW, "head": None}, "'head' decides for no layer: the first match decides, so put it before '*'"),
        ({"head": LOW, "*": LOW, "he*": None}, "'he*' decides for no layer"),
        ({"blocks.0": None, "*": LOW}, "only blocks.0 (Block): use 'blocks.0.*' for the layers inside"),
        ({"*.drop": LOW, "*": LOW}, "'*.drop' matches no layer that has a drop-in, only drop (Identity)"),
        ({}, "empty dict"),
    ],
    ids=str,
)
def test_a_pattern_that_decides_for_nothing_is_an_error_that_names_it(config: dict, words: str) -> None:
    model = Network()
    model.add_module("drop", nn.Identity())
    if "*.drop" in config:
        config = {"drop" if key == "*.drop" else key: value for key, value in config.items()}
        words = words.replace("*.drop", "drop")
    with pytest.raises(ValueError) as caught:
        br.razor_(model, config)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not any(isinstance(module, (DropIn, Linked)) for module in model.modules())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"head": 0.9}, "the pattern 'head' takes a RazorConfig or None, not float"),
        ({"head": "dense"}, "the pattern 'head' takes a RazorConfig or None, not str"),
        ({3: LOW}, "keys, not 3"),
        ([("head", LOW)], "not list"),
    ],
)
def test_wrong_types_in_a_dict(config: object, words: str) -> None:
    with pytest.raises(TypeError) as caught:
        br.razor_(Network(), config)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_everything_dense_converts_nothing() -> None:
    with pytest.raises(ValueError, match="was converted"):
        br.razor_(Network(), {"*": None})


def test_patterns_and_filter_fn_together() -> None:
    model, asked = Network(), []

    def only_linear(name: str, module: nn.Module) -> bool:
        asked.append(name)
        return isinstance(module, nn.Linear)

    report = br.razor_(model, {"head": None, "blocks.0.*": HIGH}, only_linear)
    assert [row.name for row in report.replaced] == ["blocks.0.attn", "blocks.0.mlp.0", "blocks.0.mlp.2"]
    reasons = {row.name: row.reason for row in report.left}
    assert reasons["blocks.0.mlp.1"] == "left out by filter_fn"
    assert reasons["head"] == "left out by the pattern 'head'"
    assert reasons["blocks.1.mlp.1"] == "no pattern matches it"
    assert set(asked) == {"blocks.0.attn", "blocks.0.mlp.0", "blocks.0.mlp.1", "blocks.0.mlp.2"}


def test_any_name_of_a_shared_module_matches() -> None:
    model = Network()
    model.add_module("tied", model.blocks[0].attn)
    br.razor_(model, {"tied": HIGH, "*": LOW})
    assert model.blocks[0].attn.razor.pruned.sparsity == 0.97


def test_the_head_s_sparsity_is_that_of_the_head_s_configuration() -> None:
    model = Network()
    br.razor_(model, {"head": br.RazorConfig(0.5, head_sparsity=0.25), "*": br.RazorConfig(0.9, head_sparsity=0.1)})
    assert sparsities(model)["head"] == 0.25 and sparsities(model)["blocks.0.attn"] == 0.9


def test_a_model_that_is_one_layer() -> None:
    layer = nn.Linear(5, 3)
    assert [row.name for row in br.razor_(layer, {"*": LOW}).replaced] == [""]


# razor_ again


def test_two_calls_with_other_filters_add_up_and_say_so() -> None:
    model = mlp()
    first = br.razor_(model, HIGH, lambda name, module: name in ("0", "3"))
    assert not first.earlier_kept and "earlier" not in first.table().replace("earlier_", "")
    flag = model[3].flag_for(torch.zeros(1))
    again = br.razor_(model, LOW, lambda name, module: name in ("0", "5"))
    assert sparsities(model) == {"0": 0.9, "3": 0.97, "5": 0.9}
    assert (again.earlier_kept, again.earlier_renewed, again.earlier_turned_back) == (["3"], ["0"], [])
    assert "drop-ins of an earlier razor_: 1 kept as they were (3), 1 converted anew (0)" in again.table()
    reasons = {row.name: row.reason for row in again.left}
    assert reasons["3"] == "left out by filter_fn, so what an earlier razor_ made of it stays"
    assert reasons["1"] == "left out by filter_fn"
    assert model[3].flag_for(torch.zeros(1)) is flag
    assert br.unrazor_(model) == 3


def test_what_no_pattern_matches_keeps_its_earlier_drop_in_and_none_takes_it_away() -> None:
    model = Network()
    br.razor_(model, HIGH)
    report = br.razor_(model, {"blocks.0.*": LOW, "head": None})
    found = sparsities(model)
    assert (found["blocks.0.attn"], found["blocks.1.attn"], found["head"]) == (0.9, 0.97, None)
    assert report.earlier_turned_back == ["head"] and "1 turned back (head)" in report.table()
    report = br.razor_(model, {"blocks.1.*": None})  # nothing converted, and yet something done
    assert not report.replaced and sparsities(model)["blocks.1.attn"] is None


def test_what_the_new_configuration_refuses_is_turned_back_and_reported() -> None:
    model = mlp()
    br.razor_(model)
    report = br.razor_(model, br.RazorConfig(0.5, activation="dense"))
    assert report.earlier_turned_back == ["1"] and type(model[1]) is nn.GELU
    assert ("1", "activation=dense") in [(row.name, row.reason) for row in report.left]


def test_chains_are_found_again_among_kept_and_new_layers() -> None:
    model = mlp()
    assert br.razor_(model, LOW).fused == 2
    report = br.razor_(model, HIGH, lambda name, module: name == "0")
    assert report.fused == 2 and isinstance(model, Linked)
    x = torch.randn(3, 20)
    assert torch.equal(model(x), mlp_like(model)(x))


def mlp_like(model: nn.Module) -> nn.Module:
    plain = copy.deepcopy(model)
    br.unrazor_(plain)
    return plain


class OwnError(Exception):
    pass


def failing(name: str, module: nn.Module) -> bool:
    if name == "5":
        raise OwnError
    return True


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((LOW, lambda name, module: False), None),
        (({"nothing": LOW},), ValueError),
        ((LOW, failing), OwnError),
        ((0.9,), TypeError),
    ],
    ids=["nothing passes", "no match", "filter_fn raises", "type"],
)
@pytest.mark.parametrize("razored", [False, True])
def test_a_call_that_fails_leaves_the_model_as_it_was(arguments: tuple, error: type | None, razored: bool) -> None:
    model = mlp()
    if razored:
        br.razor_(model, HIGH)
    before = [(type(m), getattr(m, "razor", None), sorted(m.__dict__)) for m in model.modules()]
    with pytest.raises(error or ValueError):
        br.razor_(model, *arguments)
    assert [(type(m), getattr(m, "razor", None), sorted(m.__dict__)) for m in model.modules()] == before
    model(torch.randn(3, 20)).sum().backward()
