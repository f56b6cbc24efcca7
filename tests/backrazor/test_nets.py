"""What the rules say of a part of a model holds for whoever computes it: its own forward, or a function that a module
around it calls on its parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import backrazor as br

# everything exact but what is pruned, and attention nearly
PRUNES = br.RazorConfig(
    0.9, values="float32", fill="zero", norm="dense", activation="dense", attention="int8", rest="dense"
)


def timm_swin(fused: bool) -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4)}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **sizes)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model


def timm_swin_v2() -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (1, 2), "num_heads": (2, 4)}
    model = timm.create_model("swinv2_tiny_window8_256", num_classes=5, **sizes)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):  # some start from zero, behind which nothing has a gradient
            nn.init.ones_(module.weight)
    return model


def torchvision_swin(version: int) -> nn.Module:
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    second = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if version == 2 else {}
    return swin.SwinTransformer([4, 4], 24, [1, 2], [2, 4], [4, 4], num_classes=5, **second)


SWINS: dict[str, Callable[[], nn.Module]] = {
    "timm swin, fused": lambda: timm_swin(True),
    "timm swin, written out": lambda: timm_swin(False),
    "timm swin v2": timm_swin_v2,
    "torchvision swin": lambda: torchvision_swin(1),
    "torchvision swin v2": lambda: torchvision_swin(2),
}


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(2)
    out = model(x)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", SWINS)
def test_the_report_says_of_each_weight_what_its_gradient_shows(name: str) -> None:
    torch.manual_seed(0)
    plain, x = SWINS[name]().train(), torch.randn(2, 3, 32, 32)
    ours = copy.deepcopy(plain)
    report = br.razor_(ours, PRUNES)
    pruned = {row.name for row in report.replaced if "at sparsity" in row.keeps}
    whole = {row.name for row in (*report.replaced, *report.left)} - pruned
    theirs, mine = gradients(plain, x), gradients(ours, x)
    seen = {True: 0, False: 0}
    for layer, module in plain.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        g, h = theirs[f"{layer}.weight"], mine[f"{layer}.weight"]
        error = float((g - h).norm() / g.norm())
        assert layer in pruned | whole, f"the report says nothing of {layer}"
        assert (error > 0.05) == (layer in pruned), f"{layer} is off by {error:.4f}; pruned: {layer in pruned}"
        seen[layer in pruned] += 1
    assert seen[True]


@pytest.mark.parametrize("version", [1, 2])
def test_ends_of_a_transformer_are_known_without_a_drop_in_for_its_attention(version: int) -> None:
    model = torchvision_swin(version)
    report = br.razor_(model, br.RazorConfig(0.9))
    keeps = {row.name: row.keeps for row in report.replaced}
    assert {name for name, words in keeps.items() if "all of it" in words} == {"features.0.0", "head"}
    paper = br.razor_(model, br.RazorConfig.paper(0.9))
    dense = {row.name for row in paper.left if "both ends" in row.reason}
    assert dense == {"features.0.0", "norm", "head"}


def test_gates_of_channels_are_no_attention_of_tokens() -> None:
    class SplitAttn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()

    model = nn.Sequential(nn.Conv2d(3, 8, 3), SplitAttn(), nn.Flatten(), nn.Linear(288, 5))
    report = br.razor_(model, br.RazorConfig(0.9))
    whole = [row.name for row in report.replaced if "all of it" in row.keeps]
    assert whole == ["3"]  # the classifier of a convolutional network, and no other layer


class Borrows(nn.Module):
    """Hands the parameters of its parts to functions by itself."""

    def __init__(self, parts: dict[str, nn.Module], function: Callable) -> None:
        super().__init__()
        self.parts, self.function = nn.ModuleDict(parts), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.parts["of"]) + self.parts["other"](x).mean()


class Squared(nn.Linear):
    """A class without a drop-in."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


BORROWED: dict[str, tuple[Callable[[], nn.Module], Callable, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(64, 8), lambda x, m: F.linear(x, m.weight, m.bias), (4, 32, 64)),
    "linear, a view of the weight": (lambda: nn.Linear(64, 8), lambda x, m: F.linear(x, m.weight[:5]), (4, 32, 64)),
    "linear, by names": (lambda: nn.Linear(64, 8), lambda x, m: F.linear(x, weight=m.weight), (4, 32, 64)),
    "addmm": (lambda: nn.Linear(64, 8), lambda x, m: torch.addmm(m.bias, x.view(-1, 64), m.weight.t()), (4, 32, 64)),
    "conv": (
        lambda: nn.Conv2d(8, 8, 3),
        lambda x, m: F.conv2d(x.view(4, 8, 4, 64), m.weight).mean((2, 3)),
        (4, 32, 64),
    ),
    "layer norm": (lambda: nn.LayerNorm(64), lambda x, m: F.layer_norm(x, (64,), m.weight)[..., :8], (4, 32, 64)),
}


def borrowing(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, function, shape = BORROWED[name]
    return Borrows({"of": build(), "other": nn.Linear(shape[-1], 8)}, function), torch.randn(shape)


def stays(name: str, model: nn.Module, x: Tensor) -> tuple[float, set[str]]:
    """How far the gradient of the borrowed weight is off dense, and the roles of what the model saves."""
    plain = copy.deepcopy(model)
    br.unrazor_(plain)
    theirs, mine = (gradients(it, x)["parts.of.weight"] for it in (plain, model))
    with br.memory.ledger(model) as book:
        out = model(x)
    roles = {row.role for row in book.rows if row.module == ""}
    del out
    return float((theirs - mine).norm() / theirs.norm()), roles


@pytest.mark.parametrize("name", BORROWED)
def test_what_is_left_out_is_left_out_of_functions_too(name: str) -> None:
    model, x = borrowing(name)
    br.razor_(model, {"*.of": None, "*": br.RazorConfig(0.9)})
    error, roles = stays(name, model, x)
    assert error == 0
    assert roles <= {"dense"}


@pytest.mark.parametrize("name", BORROWED)
def test_a_part_s_own_rules_hold_in_functions(name: str) -> None:
    exact = br.RazorConfig(0.0, values="float32", norm="dense", rest="int8")
    model, x = borrowing(name)
    br.razor_(model, {"*.of": exact, "*": br.RazorConfig(0.9)})
    assert stays(name, model, x)[0] < 1e-6
    br.razor_(model, {"*.of": br.RazorConfig(0.9), "*": exact})
    assert stays(name, model, x)[0] > 0.01


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo looks
@pytest.mark.parametrize("name", BORROWED)
def test_a_part_s_own_rules_hold_in_compiled_functions(name: str) -> None:
    model, x = borrowing(name)
    exact = br.RazorConfig(0.0, values="float32", norm="dense", rest="int8")
    for config in ({"*.of": None, "*": br.RazorConfig(0.9)}, {"*.of": br.RazorConfig(0.9), "*": exact}):
        br.razor_(model, config)
        torch._dynamo.reset()
        compiled, plain = torch.compile(model, backend="aot_eager", fullgraph=True), gradients(model, x)
        model.zero_grad()
        torch.manual_seed(2)
        out = compiled(x)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        torch.testing.assert_close(model.parts["of"].weight.grad, plain["parts.of.weight"], rtol=1e-4, atol=1e-5)


def test_a_weight_that_parts_share_follows_the_module_that_runs() -> None:
    model, x = borrowing("linear")
    model.parts["tied"] = nn.Linear(64, 8)
    model.parts["tied"].weight = model.parts["of"].weight
    br.razor_(model, {"*.of": None, "*.tied": br.RazorConfig(0.5), "*": br.RazorConfig(0.9)})
    pruned, _ = stays("linear", model, x)
    br.unrazor_(model)
    br.razor_(model, br.RazorConfig(0.9))
    assert pruned == stays("linear", model, x)[0] > 0.1


def test_bad_numbers_are_named_by_the_part() -> None:
    model, x = borrowing("linear")
    br.razor_(model)
    x[0, 0, 0] = float("nan")
    model.parts["other"] = nn.Identity()
    model(x).sum().backward()
    with pytest.raises(FloatingPointError, match=r"parts\.of"):
        br.check_finite(model)


def test_rules_are_those_of_the_plain_model() -> None:
    """A class without a drop-in at the end of a transformer, which the paper leaves dense, is dense in functions."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes)
    plain.head.__class__ = Squared
    ours, x = copy.deepcopy(plain), torch.randn(4, 3, 32, 32)
    br.razor_(ours, br.RazorConfig.paper(0.9))
    with br.memory.ledger(ours) as book:
        out = ours(x)
    assert {row.role for row in book.rows if row.module == "head"} == {"dense"}
    del out
    theirs, mine = gradients(plain, x), gradients(ours, x)
    torch.testing.assert_close(mine["head.weight"], theirs["head.weight"], rtol=1e-4, atol=1e-6)
