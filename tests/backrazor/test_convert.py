"""razor_ and unrazor_: what is converted, what is said about it, and that everything else stays as it was."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import backrazor as br
from backrazor.nn import drop_in_of
from backrazor.nn.base import DropIn
from tests.backrazor.compare import assert_same_bits
from tests.backrazor.networks import convnet, freeze_norms, mlp


@pytest.mark.parametrize("key", br.DROP_INS)
def test_every_entry_is_a_drop_in_of_its_class(key: str) -> None:
    module, _, name = key.rpartition(".")
    original = getattr(pytest.importorskip(module, exc_type=ImportError), name)
    drop_in = drop_in_of(original)
    assert issubclass(drop_in, DropIn)
    assert issubclass(drop_in, original)


def test_the_type_has_to_match_exactly() -> None:
    class OwnLinear(nn.Linear):
        pass

    model = nn.Sequential(OwnLinear(3, 3), nn.Linear(3, 3))
    report = br.razor_(model)
    assert type(model[0]) is OwnLinear
    assert [row.name for row in report.replaced] == ["1"]
    assert [(row.name, row.type, row.reason) for row in report.left] == [
        ("0", "OwnLinear", "no drop-in for this class")
    ]


def test_the_report() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sigmoid(), nn.Flatten(), nn.Linear(4, 2))
    report = br.razor_(model, br.RazorConfig(0.9, head_sparsity=0.5, values="int8", activation="int4", norm="int8"))
    rows = {row.name: row for row in report.replaced}
    assert list(rows) == ["0", "1", "4"]
    assert (rows["0"].original, rows["0"].replacement) == ("Conv2d", "RazorConv2d")
    assert "0.9" in rows["0"].keeps
    assert "0.5" in rows["4"].keeps
    assert "one bit" in rows["1"].keeps
    assert [(row.name, row.type) for row in report.left] == [("2", "Sigmoid")]
    assert report.lowered == ["kept values are stored in int8", REST]
    for word in ("Conv2d", "left 2 (Sigmoid)", "precision:", "sparsity=0.9"):
        assert word in report.table()
    assert str(report) == report.table()


def test_nothing_is_lowered_in_silence() -> None:
    quiet = br.RazorConfig(
        0.9, values="float32", fill="zero", norm="dense", activation="dense", attention="dense", rest="dense"
    )
    assert br.razor_(mlp(), quiet).lowered == []
    assert len(br.razor_(mlp(), br.RazorConfig.paper(0.9)).lowered) == 2
    assert (
        br.razor_(mlp(), br.RazorConfig(values="bfloat16", norm="dense", activation="dense"))
        .lowered[0]
        .endswith("bfloat16")
    )


KEPT = "kept values are stored in int4"
NORM = "the input of normalisation is stored in int4"
SMOOTH = "the derivative of smooth activations is stored in int2"
ATTENTION = "q, k and v of attention are stored in int4"
REST = "what else autograd keeps is stored in int8, from 1024 elements on"


@pytest.mark.parametrize(
    ("model", "lines"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout()), [KEPT, REST]),
        (nn.Sequential(nn.Linear(4, 4), nn.GELU()), [KEPT, SMOOTH.replace("int2", "int4"), REST]),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), [KEPT, NORM, REST]),
        (freeze_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())), [KEPT, REST]),
        (nn.Sequential(nn.LayerNorm(4)), [NORM, REST]),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Dropout()), [REST]),
        (nn.MultiheadAttention(8, 2), [KEPT, ATTENTION]),
        (nn.TransformerEncoderLayer(8, 2, 16, activation="relu"), [KEPT, ATTENTION, NORM]),
        (nn.TransformerEncoderLayer(8, 2, 16, activation="gelu"), [SMOOTH, KEPT, ATTENTION, NORM]),
    ],
    ids=["ReLU", "GELU", "norm", "frozen norm", "norm alone", "bits", "attention", "encoder", "encoder with GELU"],
)
def test_the_report_speaks_only_of_what_the_model_has(model: nn.Module, lines: list[str]) -> None:
    assert br.razor_(model).lowered == lines


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.GELU()), "int4"),
        (nn.Sequential(nn.Linear(4, 4), nn.SiLU()), "int4"),
        (nn.TransformerEncoderLayer(8, 2, 16, activation="gelu"), "int2"),
    ],
    ids=["GELU", "SiLU", "encoder with GELU"],
)
def test_the_report_names_the_width_that_auto_chooses(model: nn.Module, word: str) -> None:
    lines = br.razor_(model, br.RazorConfig(activation="auto")).lowered
    assert f"the derivative of smooth activations is stored in {word}" in lines


def test_the_report_of_a_frozen_norm_with_its_activation_inside() -> None:
    norm = pytest.importorskip("timm.layers").BatchNormAct2d(4)
    assert br.razor_(nn.Sequential(norm)).lowered == [NORM, REST]
    assert br.razor_(freeze_norms(nn.Sequential(norm))).lowered == [REST]


def test_the_report_counts_where_precisions_differ() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    assert br.razor_(model, br.RazorConfig.paper(0.9)).lowered == [
        "kept values are stored in float16 in 2 of 4 layers",
        "kept values are stored in int8 in 1 of 4 layers",
    ]


def test_filter_fn_selects() -> None:
    model = mlp()
    report = br.razor_(model, filter_fn=lambda name, module: isinstance(module, nn.Linear) and name != "3")
    assert [row.name for row in report.replaced] == ["0", "5"]
    assert ("3", "left out by filter_fn") in [(row.name, row.reason) for row in report.left]
    for left, plain in ((model[3], nn.Linear), (model[1], nn.GELU)):  # under the net's name, nothing else is theirs
        assert not isinstance(left, DropIn)
        assert type(left).forward is plain.forward


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Sigmoid()), nn.Sequential(), nn.Softmax(-1)], ids=lambda m: type(m).__name__
)
def test_nothing_matched(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="was converted"):
        br.razor_(model)


def test_nothing_passes_the_filter() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="filter_fn"):
        br.razor_(model, filter_fn=lambda name, module: False)
    assert not any(isinstance(module, DropIn) for module in model.modules())


@pytest.mark.parametrize(
    ("model", "config", "word"), [("resnet18", None, "Module"), (nn.Linear(2, 2), 0.9, "RazorConfig")]
)
def test_wrong_types(model: object, config: object, word: str) -> None:
    with pytest.raises(TypeError, match=word):
        br.razor_(model, config)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sparsity": 1.0}, ("sparsity=1.0", "below 1")),
        ({"sparsity": -0.1}, ("sparsity=-0.1", "at least 0")),
        ({"sparsity": float("nan")}, ("sparsity=nan",)),
        ({"sparsity": "0.9"}, ("sparsity='0.9'", "not a number")),
        ({"sparsity": True}, ("sparsity=True", "not a number")),
        ({"head_sparsity": 2}, ("head_sparsity=2", "below 1")),
        ({"values": "float8"}, ("values='float8'", "bfloat16")),
        ({"index": "list"}, ("index='list'", "tile")),
        ({"norm": "int2"}, ("norm='int2'", "int4")),
        ({"activation": "int3"}, ("activation='int3'", "int2")),
    ],
)
def test_bad_configurations_name_the_field_the_value_and_the_way_out(fields: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        br.RazorConfig(**fields)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in (*words, "use "))


def test_presets() -> None:
    assert br.RazorConfig.compact() == br.RazorConfig()
    assert br.RazorConfig.compact(0.97, norm="int8") == br.RazorConfig(0.97, norm="int8")
    paper = br.RazorConfig.paper(0.95)
    assert (paper.sparsity, paper.values, paper.index, paper.norm, paper.activation) == (
        0.95,
        "paper",
        "bitmap",
        "pruned",
        "float16",
    )
    assert (br.RazorConfig.int8().sparsity, br.RazorConfig.int8().values) == (0, "int8")
    with pytest.raises(ValueError, match=r"sparsity=1\.5"):
        br.RazorConfig.int8(1.5)
    with pytest.raises(AttributeError):
        paper.sparsity = 0.1


def test_the_paper_leaves_batch_norm_on_batch_statistics_exact_and_prunes_layer_norm() -> None:
    """Its released CNN keeps torch's batch norm; its released transformer prunes the input of LayerNorm."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.LayerNorm(4 * 6 * 6))
    x = torch.randn(3, 4, 6, 6, requires_grad=True)
    gradients = {}
    for name, config in (
        ("dense", None),
        ("paper", br.RazorConfig.paper(0.9)),
        ("pruned", br.RazorConfig.paper(0.9, batch_norm="pruned")),
        ("as norm", br.RazorConfig.paper(0.9, batch_norm=None)),
    ):
        model = copy.deepcopy(plain)
        if config is not None:
            br.razor_(model, config)
        with br.memory.ledger(model) as ledger:
            y = model[0](x)
        if name == "paper":
            assert ledger.total_bytes >= x.nbytes
            assert model[0].razor.norm.kind == "dense" and model[2].razor.norm.kind == "pruned"
        (gradients[name],) = torch.autograd.grad(y.pow(3).sum(), x)
    assert torch.equal(gradients["paper"], gradients["dense"])
    assert torch.equal(gradients["pruned"], gradients["as norm"])
    assert not torch.equal(gradients["pruned"], gradients["dense"])


def test_the_paper_chooses_values_by_operator() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2))
    br.razor_(model, br.RazorConfig.paper(0.9))
    assert [model[i].razor.pruned.values for i in (0, 2, 3)] == ["float32", "float16", "int8"]
    tokens = mlp()
    br.razor_(tokens, br.RazorConfig.paper(0.9))
    assert [tokens[i].razor.pruned.values for i in (0, 3, 5)] == ["float16"] * 3


def state_of(model: nn.Module) -> list[tuple[str, type, dict]]:
    """Class and attributes of every module, tensors by identity."""
    return [(name, type(module), flat(module.__dict__)) for name, module in model.named_modules()]


def flat(attributes: dict) -> dict:
    found = {}
    for key, value in attributes.items():
        if isinstance(value, dict):
            found |= {(key, inner): id(item) for inner, item in value.items()} | {key: len(value)}
        else:
            found[key] = id(value) if isinstance(value, (torch.Tensor, nn.Module)) else value
    return found


@pytest.mark.parametrize("build", [mlp, convnet])
def test_there_and_back(build: type) -> None:
    model = build()
    before = state_of(model)
    count = len(br.razor_(model).replaced)
    assert br.unrazor_(model) == count
    assert state_of(model) == before
    assert br.unrazor_(model) == 0


def test_hooks_modes_and_parameters_stay() -> None:
    model, calls = convnet(), []
    model[1].eval()
    parameters, modes = dict(model.named_parameters()), [module.training for module in model.modules()]
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[12].register_full_backward_hook(lambda *_: calls.append("backward"))
    br.razor_(model)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    model(torch.randn(2, 3, 12, 12, requires_grad=True)).sum().backward()
    assert calls == ["forward", "backward"]


def test_state_dict_loads_both_ways() -> None:
    plain, ours = convnet(), convnet()
    br.razor_(ours)
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.load_state_dict(plain.state_dict(), strict=True)
    with torch.no_grad():
        ours[0].weight.add_(1)
    plain.load_state_dict(ours.state_dict(), strict=True)
    assert_same_bits("weight", plain[0].weight, ours[0].weight)


def through_file(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_file],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_copies_work_alone(copied: type, frozen: bool) -> None:
    model = convnet()
    if frozen:
        for norm in (model[1], model[4]):
            norm.eval().requires_grad_(False)
    br.razor_(model)
    other, x = copied(model), torch.randn(4, 3, 12, 12)
    outs = []
    for each in (model, other):
        outs.append(each(x))
        outs[-1].square().sum().backward()
    assert_same_bits("forward", *outs)
    for (name, mine), its in zip(model.named_parameters(), other.parameters(), strict=True):
        assert mine is not its
        if mine.requires_grad:
            assert_same_bits(name, mine.grad, its.grad)
    br.unrazor_(other)
    assert not any(isinstance(module, DropIn) for module in other.modules())
    assert isinstance(model[0], DropIn)


def test_razoring_twice_takes_the_new_configuration() -> None:
    model = mlp()
    count = len(br.razor_(model, br.RazorConfig(0.9)).replaced)
    again = br.razor_(model, br.RazorConfig(0.5))
    assert len(again.replaced) == len(again.earlier_renewed) == count
    assert f"{count} converted anew (0, 1, 2 and {count - 3} more)" in again.table()
    assert [model[i].razor.pruned.sparsity for i in (0, 3, 5)] == [0.5] * 3
    assert br.unrazor_(model) == count
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy])
def test_copies_of_classes_that_were_derived_since(copied: type) -> None:
    """Sharding and parametrizing derive a class at run time, of layers and of containers with chains."""
    model = mlp()
    br.razor_(model)
    for module in (model, model[0]):
        module.__class__ = type(f"Derived{type(module).__name__}", (type(module),), {})
    other, x = copied(model), torch.randn(3, 20)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert_same_bits("forward", other(x), model(x))


def test_a_module_used_twice_is_converted_once() -> None:
    shared = nn.Linear(6, 6)
    plain = nn.Sequential(shared, nn.Tanh(), shared)
    ours = copy.deepcopy(plain)
    report = br.razor_(ours, br.RazorConfig(0.0, values="float32"))
    assert [row.name for row in report.replaced] == ["0"]
    assert ours[0] is ours[2]
    x = torch.randn(5, 6)
    for model in (plain, ours):
        model(x).sum().backward()
    torch.testing.assert_close(ours[0].weight.grad, plain[0].weight.grad, rtol=1e-5, atol=1e-6)


def test_head_sparsity_is_for_the_last_linear() -> None:
    model = mlp()
    br.razor_(model, br.RazorConfig(0.9, head_sparsity=0.25))
    assert [model[i].razor.pruned.sparsity for i in (0, 3, 5)] == [0.9, 0.9, 0.25]


def test_a_model_that_is_one_layer() -> None:
    layer = nn.Linear(5, 3)
    assert [row.name for row in br.razor_(layer).replaced] == [""]
    layer(torch.randn(4, 5)).sum().backward()
    assert layer.weight.grad is not None
    assert br.unrazor_(layer) == 1
    assert type(layer) is nn.Linear
