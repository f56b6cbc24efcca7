"""In-place operations that the dense network accepts, on outputs and on inputs after their use: the razored one accepts
them with the same gradients, for every operator, with chains and without."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import backrazor as br
from tests.backrazor.compare import assert_close
from tests.backrazor.networks import freeze_norms

# Nothing lost: gradients are the dense ones to rounding where no derivative is quantised.
EXACT = br.RazorConfig(
    0.0, values="float32", norm="bfloat16", activation="float16", attention="int8", gate="int8", rest="dense"
)


def _add(x: Tensor) -> None:
    x += 1


def _add_a_tensor(x: Tensor) -> None:
    x += torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)


def _multiply(x: Tensor) -> None:
    x *= 1.5


def _mask(x: Tensor) -> None:
    x.masked_fill_(torch.arange(x.shape[-1]) % 2 == 0, 0.5)


def _assign(x: Tensor) -> None:
    x[..., :1] = 0.25


def _assign_a_view(x: Tensor) -> None:
    x.flatten(1)[:, :1].zero_()


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "nothing": lambda x: None,
    "+= number": _add,
    "+= tensor": _add_a_tensor,
    "*=": _multiply,
    "relu_": torch.relu_,
    "masked_fill_": _mask,
    "slice": _assign,
    "view": _assign_a_view,
    "clamp_": lambda x: x.clamp_(-0.5, 0.5),
    "dropout_": lambda x: F.dropout(x, 0.5, True, inplace=True),
}


class Layer(nn.Module):
    """A layer between two others, with what is done in place to its output and, after its use, to its input."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.before = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.layer = layer

    def forward(self, x: Tensor, before: Callable[[Tensor], object], after: Callable[[Tensor], object]) -> Tensor:
        x = x * self.before
        out = self.layer(x)
        after(out)
        before(x)
        return weighed(out) + x.sum()


def weighed(out: Tensor) -> Tensor:
    """A sum in which every element has a weight of its own, so that no gradient cancels."""
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(7))).sum()


def _convolution(*following: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: freeze_norms(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *(build() for build in following)))


def _norm() -> nn.Module:
    return nn.BatchNorm2d(4)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear, 2 dimensions": (lambda: nn.Sequential(nn.Linear(6, 8)), (4, 6)),
    "linear, 3 dimensions": (lambda: nn.Sequential(nn.Linear(6, 8)), (4, 5, 6)),
    "linear, 4 dimensions": (lambda: nn.Sequential(nn.Linear(6, 8)), (2, 3, 5, 6)),
    "linear, no bias": (lambda: nn.Sequential(nn.Linear(6, 8, bias=False)), (4, 5, 6)),
    "linear and GELU": (lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU()), (4, 5, 6)),
    "linear and ReLU": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU()), (4, 5, 6)),
    "linear and ReLU in place": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True)), (4, 5, 6)),
    "conv": (_convolution(), (2, 3, 6, 6)),
    "conv, norm": (_convolution(_norm), (2, 3, 6, 6)),
    "conv, norm, ReLU": (_convolution(_norm, nn.ReLU), (2, 3, 6, 6)),
    "conv, norm, ReLU6 in place": (_convolution(_norm, lambda: nn.ReLU6(inplace=True)), (2, 3, 6, 6)),
    "conv, norm, SiLU in place": (_convolution(_norm, lambda: nn.SiLU(inplace=True)), (2, 3, 6, 6)),
    "batch norm": (lambda: nn.Sequential(nn.BatchNorm2d(3)), (2, 3, 6, 6)),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(6)), (4, 5, 6)),
    "layer norm and linear": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8)), (4, 5, 6)),
    "rms norm": (lambda: nn.Sequential(nn.RMSNorm(6)), (4, 5, 6)),
    "group norm": (lambda: nn.Sequential(nn.GroupNorm(2, 6)), (4, 6, 6)),
    "ReLU": (lambda: nn.Sequential(nn.ReLU()), (4, 6)),
    "Hardtanh in place": (lambda: nn.Sequential(nn.Hardtanh(inplace=True)), (4, 6)),
    "GELU": (lambda: nn.Sequential(nn.GELU()), (4, 6)),
    "Hardswish in place": (lambda: nn.Sequential(nn.Hardswish(inplace=True)), (4, 6)),
    "dropout": (lambda: nn.Sequential(nn.Dropout(0.5)), (4, 6)),
    "dropout in place": (lambda: nn.Sequential(nn.Dropout(0.5, inplace=True)), (4, 6)),
    "max pooling": (lambda: nn.Sequential(nn.MaxPool2d(2)), (2, 3, 6, 6)),
    "max pooling of video": (lambda: nn.Sequential(nn.MaxPool3d(2)), (2, 3, 4, 6, 6)),
    "average pooling": (lambda: nn.Sequential(nn.AvgPool2d(2)), (2, 3, 6, 6)),
    "global pooling": (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1)), (2, 3, 6, 6)),
    "global pooling of one position": (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1)), (2, 6, 1, 1)),
}


class _Called(nn.Module):
    """A function that a module calls by itself, of what a layer gives."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], width: int) -> None:
        super().__init__()
        self.first, self.function = nn.Linear(width, width), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.first(x))


LAYERS |= {
    "gated product": (lambda: nn.Sequential(_Called(lambda y: F.silu(y) * y, 64)), (2, 16, 64)),
    "amax": (lambda: nn.Sequential(_Called(lambda y: y.amax(1), 6)), (4, 5, 6)),
}
PLAINEST = {"+= number", "nothing"}


def outcome(
    model: nn.Module, x: Tensor, before: Callable[[Tensor], object], after: Callable[[Tensor], object]
) -> dict[str, Tensor] | str:
    """Gradients by name, or where it raised."""
    model.zero_grad()
    torch.manual_seed(3)
    place = "forward"
    try:
        loss = model(x, before, after)
        place = "backward"
        loss.backward()
    except RuntimeError:
        return place
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def out_of_place(
    model: nn.Module, x: Tensor, before: Callable[[Tensor], object], after: Callable[[Tensor], object]
) -> dict[str, Tensor]:
    """The same program with copies: what the in-place one means."""
    model.zero_grad()
    torch.manual_seed(3)
    scaled = x * model.before
    changed = model.layer(scaled).clone()
    after(changed)
    kept = scaled.clone()
    before(kept)
    (weighed(changed) + kept.sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", LAYERS)
def test_in_place_operations(name: str) -> None:
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    plain = Layer(build(), shape[-1])
    razored = copy.deepcopy(plain)
    br.razor_(razored, EXACT)
    x = torch.randn(shape)
    accepted = 0
    for after_name, after in CHANGES.items():
        for before_name, before in CHANGES.items():
            if before_name not in PLAINEST and after_name not in PLAINEST:
                continue
            words = f"{name}: output {after_name}, input {before_name}"
            wanted, got = outcome(plain, x, before, after), outcome(razored, x, before, after)
            if isinstance(wanted, str):
                # The dense network's backward would have read a changed tensor. Ours either says so too, or has kept
                # what it needs and gives the gradient of the same program with copies.
                if isinstance(got, str):
                    assert got == wanted, words
                    continue
                if getattr(plain.layer[0], "inplace", False):
                    # relu_ is met as a function: it has kept bits, not the result that was changed since
                    assert "relu_" in words, f"{words} was accepted"
                    continue
                wanted = out_of_place(plain, x, before, after)
            assert not isinstance(got, str), f"{words} raised in {got}"
            accepted += 1
            for key in wanted:
                assert_close(f"{key} of {words}", got[key], wanted[key], 1e-2)
    assert accepted > len(CHANGES)


@pytest.mark.parametrize("view", ["slice", "reshape", "transpose", "chunk"])
@pytest.mark.parametrize(
    "layer", [nn.ReLU(True), nn.ReLU6(True), nn.Hardtanh(inplace=True), nn.SiLU(True), nn.Dropout(0.5, True)]
)
def test_layers_in_place_on_views(layer: nn.Module, view: str) -> None:
    """The layer changes a part of another tensor, which goes on with the change."""
    take = {
        "slice": lambda x: x[:, :4],
        "reshape": lambda x: x.view(2, -1),
        "transpose": lambda x: x.t(),
        "chunk": lambda x: x.split(3, dim=1)[0] if not x.requires_grad else x.narrow(1, 0, 3),
    }[view]
    plain = nn.Sequential(copy.deepcopy(layer))
    razored = copy.deepcopy(plain)
    br.razor_(razored, EXACT)
    found = []
    for model in (plain, razored):
        torch.manual_seed(0)
        x = torch.randn(4, 6).requires_grad_()
        whole = x * 1.0
        out = model(take(whole))
        (whole.square().sum() + out.sum()).backward()
        found.append(x.grad)
    assert_close(f"{layer} on a {view}", found[1], found[0], 1e-3)


def test_a_residual_sum_in_place() -> None:
    """As many networks write it: y = proj(x); y += shortcut."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc1, self.act, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc2(self.act(self.fc1(self.norm(x))))
            y += x
            return y

    plain = nn.Sequential(Block(), Block())
    razored = copy.deepcopy(plain)
    br.razor_(razored, EXACT)
    x = torch.randn(3, 5, 8)
    for model in (plain, razored):
        model(x).square().sum().backward()
    for (key, a), b in zip(razored.named_parameters(), plain.parameters(), strict=True):
        assert_close(key, a.grad, b.grad, 1e-2)


def test_a_norm_kept_for_its_follower_is_not_used_once_it_changed() -> None:
    """A Linear reads the norm's codes in place of its input: not where that was changed in between."""
    norm, linear = nn.LayerNorm(6), nn.Linear(6, 4)
    model = nn.ModuleList([norm, linear])
    plain = copy.deepcopy(model)
    br.razor_(model, br.RazorConfig(0.0, values="float32", norm="int8"))
    x = torch.randn(4, 5, 6)
    for each in (plain, model):
        h = each[0](x)
        h *= 3
        each[1](h).square().sum().backward()
    assert_close("weight", model[1].weight.grad, plain[1].weight.grad, 1e-5)
