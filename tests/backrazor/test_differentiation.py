"""What can be differentiated through a razored network, and what says in one line that it cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import backrazor as br
from tests.backrazor.compare import assert_close, assert_same_bits
from tests.backrazor.networks import convnet, freeze_norms, mlp

EXACT = br.RazorConfig(0.0, values="float32", norm="int8", activation="int8", attention="int8", rest="dense")

# torch.jit says so, and PyTorch itself loads it for forward-mode differentiation
JIT_IS_DEPRECATED = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning"
)


class Gated(nn.Module):
    """A feature map times a gate, by timm's LayerScale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = pytest.importorskip("timm").layers.LayerScale(6, init_values=0.5)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.scale(x))


class Product(nn.Module):
    """A gated product, large enough that both factors are packed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(32, 64), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate, other = self.first(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * other)


class Largest(nn.Module):
    """The largest of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.amax(1))


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True)


OPERATORS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5)), (4, 6)),
    "linear and activation": (lambda: nn.Sequential(nn.Linear(6, 5), nn.GELU()), (4, 6)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), (2, 3, 8, 8)),
    "conv, norm, activation": (
        lambda: freeze_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())),
        (2, 3, 8, 8),
    ),
    "frozen batch norm": (lambda: freeze_norms(nn.Sequential(nn.BatchNorm2d(3))), (2, 3, 4, 4)),
    "batch norm": (lambda: nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), (2, 3, 4, 4)),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(6)), (4, 6)),
    "rms norm": (lambda: nn.Sequential(nn.RMSNorm(6)), (4, 6)),
    "group norm": (lambda: nn.Sequential(nn.GroupNorm(2, 6)), (4, 6, 5)),
    "relu": (lambda: nn.Sequential(nn.ReLU()), (4, 6)),
    "relu in place": (lambda: nn.Sequential(nn.LayerNorm(6), nn.ReLU(inplace=True)), (4, 6)),
    "gelu": (lambda: nn.Sequential(nn.GELU()), (4, 6)),
    "dropout": (lambda: nn.Sequential(nn.Dropout(0.5)), (4, 6)),
    "max pooling": (lambda: nn.Sequential(nn.MaxPool2d(2)), (2, 3, 6, 6)),
    "max pooling of video": (lambda: nn.Sequential(nn.MaxPool3d(2)), (2, 3, 4, 6, 6)),
    "average pooling": (lambda: nn.Sequential(nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)), (2, 3, 6, 6)),
    "attention": (encoder, (2, 5, 8)),
    "gate": (Gated, (2, 5, 6)),
    "gated product": (Product, (4, 16, 32)),
    "amax": (Largest, (4, 5, 6)),
}


@pytest.fixture(params=OPERATORS)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    build, shape = OPERATORS[request.param]
    model = build()
    br.razor_(model, EXACT)
    return model, torch.randn(shape)


def test_a_gradient_penalty_refuses(network: tuple[nn.Module, Tensor]) -> None:
    """Whatever the operator: its gradient requires a gradient, as the dense one does, and says why it has none."""
    model, x = network
    (gradient,) = torch.autograd.grad(model(x.requires_grad_()).square().sum(), x, create_graph=True)
    assert gradient.requires_grad
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again.*unrazor_.*filter_fn"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("build", [mlp, convnet])
def test_a_gradient_under_create_graph_is_the_gradient(build: Callable[[], nn.Module]) -> None:
    model = build()
    br.razor_(model, br.RazorConfig(0.5))
    x = torch.randn(4, 20) if build is mlp else torch.randn(4, 3, 16, 16)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = [torch.autograd.grad(model(x).square().sum(), parameters, create_graph=again) for again in (False, True)]
    for plain, again in zip(*found, strict=True):
        assert_same_bits("gradient", again, plain)


def test_the_penalty_of_a_critic_refuses_and_is_exact_once_turned_back() -> None:
    """The case that was wrong in silence: neither the output's gradient nor a saved tensor requires one."""
    critic = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    plain, x = copy.deepcopy(critic), torch.randn(4, 6)
    br.razor_(critic, EXACT)

    def penalty(model: nn.Module) -> Tensor:
        point = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(point).sum(), point, create_graph=True)
        (gradient.norm(dim=1) - 1).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    with pytest.raises(RuntimeError, match="backrazor"):
        penalty(critic)
    br.unrazor_(critic)
    assert_same_bits("penalty", penalty(critic), penalty(plain))


def gradients_of(model: nn.Module, x: Tensor, transformed: bool) -> dict[str, Tensor]:
    """By ``torch.func.grad`` over ``functional_call``, or by ``backward``."""
    torch.manual_seed(1)
    if transformed:
        parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        return torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(model(x).square().sum(), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


@pytest.mark.parametrize("preset", ["compact", "paper"])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_functional_gradient_is_the_gradient(name: str, preset: str) -> None:
    build, shape = OPERATORS[name]
    model = nn.ModuleList([build()])
    if not any(p.requires_grad for p in model.parameters()):
        model.append(nn.LayerNorm(shape[-1]))
    network = nn.Sequential(*reversed(model))
    br.razor_(network, getattr(br.RazorConfig, preset)(0.5))
    x = torch.randn(shape)
    wanted, got = gradients_of(network, x, False), gradients_of(network, x, True)
    assert wanted.keys() == got.keys()
    for key in wanted:
        assert_close(f"{key} of {name}", got[key], wanted[key], 1e-5)


def test_a_functional_gradient_with_respect_to_the_input(network: tuple[nn.Module, Tensor]) -> None:
    model, x = network
    torch.manual_seed(1)
    got = torch.func.grad(lambda x: model(x).square().sum())(x)
    torch.manual_seed(1)
    (wanted,) = torch.autograd.grad(model(x.requires_grad_()).square().sum(), x)
    assert_close("input", got, wanted, 1e-5)


def test_what_a_functional_gradient_depends_on_is_not_lost() -> None:
    """An outer differentiation, by autograd or by ``torch.func``, refuses."""
    model, x = mlp(), torch.randn(4, 20)
    br.razor_(model, EXACT)
    parameters = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    inner = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        sum(g.square().sum() for g in inner.values()).backward()
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.func.grad(lambda x: torch.func.grad(lambda x: model(x).sum())(x).square().sum())(x)


def test_per_sample_gradients_refuse(network: tuple[nn.Module, Tensor]) -> None:
    model, x = network
    one = torch.func.grad(lambda x: model(x.unsqueeze(0)).sum())
    with pytest.raises(RuntimeError, match=r"vmap .* cannot go through a razored layer: call backrazor.unrazor_"):
        torch.func.vmap(one, randomness="different")(x)
    out = model(x.requires_grad_())
    with pytest.raises(RuntimeError, match="vmap"):
        torch.autograd.grad(out, x, torch.ones(3, *out.shape), is_grads_batched=True)


@JIT_IS_DEPRECATED
def test_forward_mode_refuses(network: tuple[nn.Module, Tensor]) -> None:
    model, x = network
    model.requires_grad_()
    if not list(model.parameters()):
        pytest.skip("without parameters nothing needs a gradient: the dense operator runs")
    with pytest.raises(RuntimeError, match=r"forward-mode .* cannot go through a razored layer"):
        torch.func.jvp(lambda x: model(x), (x.requires_grad_(),), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        model(forward_ad.make_dual(x, torch.ones_like(x)))


@JIT_IS_DEPRECATED
@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: f])
def test_without_gradients_everything_goes_through(transform: Callable) -> None:
    model = mlp()
    plain, x = copy.deepcopy(model), torch.randn(3, 4, 20)
    br.razor_(model)
    with torch.no_grad():
        assert_same_bits("output", transform(model)(x), transform(plain)(x))
        with forward_ad.dual_level():
            tangents = [
                forward_ad.unpack_dual(each(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
                for each in (model, plain)
            ]
    assert_same_bits("tangent", *tangents)


@JIT_IS_DEPRECATED
def test_recorders_ask_for_the_plain_network(network: tuple[nn.Module, Tensor]) -> None:
    model, x = network
    with pytest.raises(RuntimeError, match=r"torch.jit.script .*unrazor_\(model\) first"):
        torch.jit.script(model)
    for _ in range(2):  # with gradients and without
        with pytest.raises(RuntimeError, match=r"torch.jit.trace .*unrazor_\(model\) first"):
            torch.jit.trace(model, x)
        model.requires_grad_(False)


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.LayerNorm(4)])
def test_fx_asks_for_the_plain_network(layer: nn.Module) -> None:
    model = nn.Sequential(copy.deepcopy(layer))
    br.razor_(model)
    with pytest.raises(TypeError, match=r"torch.fx cannot trace through a razored layer"):
        torch.fx.symbolic_trace(model)


def test_exported_networks_compute_the_dense_output() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2))
    plain, x = copy.deepcopy(model), torch.randn(4, 6)
    br.razor_(model)
    assert_same_bits("exported", torch.export.export(model, (x,)).module()(x), plain(x))


def test_autocast_keeps_the_parameter_and_not_a_copy_per_call() -> None:
    """A layer used several times: what is kept of its weight is the weight."""
    for layer, shape in ((nn.Linear(64, 64), (8, 64)), (nn.Conv2d(8, 8, 3, padding=1), (2, 8, 6, 6))):
        plain, razored = nn.Sequential(layer), nn.Sequential(copy.deepcopy(layer))
        br.razor_(razored, br.RazorConfig(0.9))
        kept, gradients = {}, {}
        for name, model in (("dense", plain), ("razored", razored)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            with br.memory.ledger(model) as book, torch.autocast("cpu", torch.bfloat16):
                for _ in range(10):
                    x = model(x)
                loss = x.float().sum()
            loss.backward()
            kept[name], gradients[name] = book.total_bytes, model[0].weight.grad
        weight = layer.weight.numel() * 2
        assert kept["razored"] < kept["dense"] - weight, (kept, weight)
        assert gradients["razored"].dtype == torch.float32


def test_autocast_leaves_no_lowered_weight_without_a_graph() -> None:
    """A dense layer that shares the weight, in the same region, after the razored one: its gradient is whole."""
    shared = nn.Linear(6, 6, bias=False)
    model = nn.Sequential(shared)
    x = torch.randn(4, 6)
    br.razor_(model, EXACT)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        out = F.linear(x, shared.weight)
    out.float().sum().backward()
    assert shared.weight.grad is not None and bool(shared.weight.grad.any())
