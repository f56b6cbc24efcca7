"""Chains that run as one operator: linked where that is safe, bit-equal either way, unlinked by the norm's state."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import backrazor as br
from backrazor.functional import common
from tests.backrazor.compare import assert_close, assert_same_bits
from tests.backrazor.networks import convnet, freeze_norms

CONFIG = br.RazorConfig(0.8, values="float32", fill="zero", norm="int8", activation="int8")


def timm_model(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return pytest.importorskip("timm").create_model(name, num_classes=5)

    return build


def vision_model(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return getattr(pytest.importorskip("torchvision").models, name)(num_classes=5)

    return build


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and how many convolutions lead a chain
    "timm efficientnet_lite0": (timm_model("efficientnet_lite0"), 49),
    "timm resnet18": (timm_model("resnet18"), 20),
    "timm mobilenetv2_100": (timm_model("mobilenetv2_100"), 52),
    "torchvision resnet18": (vision_model("resnet18"), 20),
    "torchvision mobilenet_v2": (vision_model("mobilenet_v2"), 52),
}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_published_networks(name: str, frozen: bool) -> None:
    build, chains = MODELS[name]
    plain = build().train()
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if frozen:
        freeze_norms(plain)
    ours = copy.deepcopy(plain)
    report = br.razor_(ours, CONFIG)
    assert report.fused == chains
    x = torch.randn(2, 3, 64, 64)
    out, expected = ours(x), plain(x)
    assert_same_bits(name, out, expected)
    out.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in ours.parameters() if p.requires_grad)
    with torch.no_grad():
        assert_same_bits(f"{name} without a graph", ours(x), plain(x))
    br.unrazor_(ours)
    assert_same_bits(f"{name} turned back", ours.eval()(x), plain.eval()(x))


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    out = model(x)
    model.zero_grad()
    out.square().sum().backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def unlinked(model: nn.Module) -> nn.Module:
    """The same drop-ins, each running on its own."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for key in ("_backrazor_followers", "_backrazor_norm"):
            module.__dict__.pop(key, None)
    return model


def test_a_chain_computes_what_its_members_do() -> None:
    model = freeze_norms(convnet(inplace=True))
    assert br.razor_(model, CONFIG).fused == 2
    x = torch.randn(4, 3, 12, 12)
    (fused, ours), (apart, theirs) = gradients(model, x), gradients(unlinked(model), x)
    assert_same_bits("forward", fused, apart)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_close(name, ours[name], theirs[name], 1e-5)


def chain() -> nn.Module:
    return freeze_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))


class Runs:
    """Which operators of the chain ran on their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fused = 0
        from backrazor import functional

        original = functional.conv_norm_act

        def counted(*arguments: object) -> Tensor:
            self.fused += 1
            return original(*arguments)

        monkeypatch.setattr(functional, "conv_norm_act", counted)


def test_the_norm_decides_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, model, plain = Runs(monkeypatch), chain(), None
    plain = copy.deepcopy(model)
    br.razor_(model, CONFIG)
    x = torch.randn(4, 3, 8, 8)
    for change, fused in (
        (lambda m: None, True),
        (lambda m: m[1].train(), False),
        (lambda m: m[1].eval(), True),
        (lambda m: m[1].weight.requires_grad_(), False),
        (lambda m: m[1].requires_grad_(False), True),
    ):
        before = runs.fused
        change(model)
        change(plain)
        out, expected = model(x), plain(x)
        assert_same_bits("forward", out, expected)
        assert (runs.fused > before) == fused
        out.sum().backward()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_hooked_members_are_not_linked(place: int) -> None:
    model, seen = chain(), []
    plain = copy.deepcopy(model)
    model[place].register_forward_hook(lambda module, args, out: seen.append(out))
    assert br.razor_(model, CONFIG).fused == 0
    x = torch.randn(2, 3, 8, 8)
    model(x)
    assert_same_bits("what the hook sees", seen[0], plain[: place + 1](x))


def test_a_channels_last_input_takes_the_members_apart() -> None:
    model = chain()
    plain = copy.deepcopy(model)
    br.razor_(model, CONFIG)
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    assert_same_bits("forward", model(x), plain(x))
    model(x).sum().backward()


CHAINS = {
    # weight smaller than the gradient, larger, pointwise by matrix products, pointwise with few positions
    "folded": (lambda: nn.Conv2d(6, 8, 3, padding=1), (4, 6, 12, 12)),
    "not folded": (lambda: nn.Conv2d(16, 16, 3), (2, 16, 4, 4)),
    "pointwise": (lambda: nn.Conv2d(6, 8, 1), (4, 6, 12, 12)),
    "few positions": (lambda: nn.Conv2d(6, 8, 1), (4, 6, 5, 5)),
}


@pytest.mark.parametrize("chunk_bytes", [1 << 23, 1])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_has_the_gradients_of_its_operators(
    name: str, channels_last: bool, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing pruned: the gradients of plain PyTorch, with a scale far from one, whatever the chunks and the weight's
    layout."""
    monkeypatch.setattr(common, "CHUNK_BYTES", chunk_bytes)
    convolution, shape = CHAINS[name]
    torch.manual_seed(0)
    model = freeze_norms(nn.Sequential(nn.Conv2d(shape[1], shape[1], 1), convolution(), nn.BatchNorm2d(8), nn.ReLU()))
    model[2] = freeze_norms(nn.BatchNorm2d(model[1].out_channels))
    for tensor in (model[2].running_var, model[2].weight.data):
        tensor.uniform_(0.2, 3)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    assert br.razor_(model, br.RazorConfig(0.0, values="float32")).fused == 1
    x = torch.randn(shape)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = model(ours), plain(theirs)
    assert_same_bits("forward", out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert_close("x", ours.grad, theirs.grad, 1e-5)
    for (key, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if b.requires_grad:
            assert_close(key, a.grad, b.grad, 1e-5)


def test_float16_sums_are_scaled_before_they_overflow() -> None:
    model = chain()
    model[1].weight.data.fill_(1e-3)
    model[1].bias.data.fill_(1.0)
    model.half()
    br.razor_(model, br.RazorConfig(0.0, values="float16"))
    x = torch.ones(2, 3, 40, 40, dtype=torch.float16, requires_grad=True)
    (model(x).float().sum() * 60).backward()  # 2 x 38 x 38 positions of 60: over 65504 before the scale, not after
    assert bool(torch.isfinite(model[0].weight.grad).all()) and bool(torch.isfinite(model[0].bias.grad).all())


def test_a_chain_takes_an_empty_batch() -> None:
    model = chain()
    br.razor_(model, CONFIG)
    x = torch.empty(0, 3, 8, 8, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.shape == x.shape and not model[0].weight.grad.any()


class SharedActivation(nn.Module):
    """One ReLU at the end of a chain and once more by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.ReLU()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), self.activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.block(x) - 0.5)


class SharedGELU(nn.Module):
    """One GELU after a Linear and once more by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.GELU()
        self.block = nn.Sequential(nn.Linear(6, 6), self.activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.block(x) - 0.5)


@pytest.mark.parametrize(("build", "shape"), [(SharedActivation, (2, 3, 5, 5)), (SharedGELU, (4, 6))])
def test_a_member_that_serves_elsewhere_too_is_not_linked(build: type, shape: tuple[int, ...]) -> None:
    plain = freeze_norms(build())
    ours = copy.deepcopy(plain)
    br.razor_(ours, CONFIG)
    x = torch.randn(shape)
    assert_same_bits("forward", ours(x), plain(x))


def test_one_activation_in_two_chains_is_not_linked() -> None:
    relu = nn.ReLU()
    model = freeze_norms(
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), relu, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), relu)
    )
    plain = copy.deepcopy(model)
    br.razor_(model, CONFIG)
    x = torch.randn(2, 3, 5, 5)
    assert_same_bits("forward", model(x), plain(x))


def test_linear_and_gelu_run_as_one() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 2))
    plain = copy.deepcopy(model)
    assert br.razor_(model, CONFIG).fused == 1
    x = torch.randn(5, 4, 6)
    (fused, ours), (apart, theirs) = gradients(model, x), gradients(unlinked(model), x)
    assert_same_bits("forward", fused, plain(x))
    assert_same_bits("forward of the parts", apart, fused)
    for name in ours:
        assert_close(name, ours[name], theirs[name], 1e-5)


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("act", [nn.SiLU, nn.GELU])
def test_a_smooth_activation_is_rounded_as_that_of_the_whole_batch(
    kind: str, act: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch works out what is left over behind whole vectors otherwise, which here are parts of every sample."""
    torch.manual_seed(0)
    if kind == "conv":
        model, x = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), act()).eval(), torch.randn(12, 3, 41, 41)
        model[1].requires_grad_(False)
    else:
        model, x = nn.Sequential(nn.Linear(7, 5), act()), torch.randn(400, 3, 7)
    expected = model(x)
    br.razor_(model, br.RazorConfig(0.9))
    monkeypatch.setattr("backrazor.functional.common.CHUNK_BYTES", 120_000 if kind == "conv" else 1)
    assert torch.equal(model(x), expected)
