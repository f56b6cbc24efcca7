"""LayerNorm, RMSNorm, GroupNorm, QuickGELU, scales and average pooling against the formulas of tests/oracles.py."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional as F

import backrazor as br
from backrazor.codecs import Pruned, pack
from backrazor.codecs.smooth import quantiser
from tests.backrazor.compare import LIMITS, assert_close, assert_same_bits
from tests.backrazor.samples import layouts
from tests.oracles import activation_gradient, channel_scale_at, layer_norm_gradient, normalised

CODEC = Pruned(0.8, "float32", "auto")
RULES = ("pruned", "bfloat16", "int8", "int4")
# layer, shape; the rows of each: LayerNorm's normalised dimensions, GroupNorm's groups
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tokens": (lambda: nn.LayerNorm(48), (3, 7, 48)),
    "an uneven width": (lambda: nn.LayerNorm(33), (5, 4, 33)),
    "two dimensions": (lambda: nn.LayerNorm((6, 5)), (4, 3, 6, 5)),
    "no bias": (lambda: nn.LayerNorm(16, bias=False), (6, 16)),
    "no affine": (lambda: nn.LayerNorm(16, elementwise_affine=False), (2, 9, 16)),
    "groups": (lambda: nn.GroupNorm(3, 12), (4, 12, 5, 7)),
    "one group": (lambda: nn.GroupNorm(1, 7), (3, 7, 11)),
    "root mean square": (lambda: nn.RMSNorm(48, eps=1e-3), (3, 7, 48)),
    "root mean square, no affine": (lambda: nn.RMSNorm((6, 5), elementwise_affine=False), (4, 3, 6, 5)),
    "root mean square, eps of the type": (lambda: nn.RMSNorm(33), (5, 33)),
    "a group per channel": (lambda: nn.GroupNorm(5, 5, affine=False), (2, 5, 3, 3)),
}


def spread(layer: nn.Module) -> nn.Module:
    """Parameters that are not the initial ones."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 1.5)
    return layer


def razored(layer: nn.Module, **fields: object) -> nn.Module:
    copied = copy.deepcopy(layer)
    br.razor_(copied, br.RazorConfig(**({"sparsity": 0.8, "values": "float32", "fill": "zero"} | fields)))
    return copied


def x_hat_of(x: Tensor) -> Tensor:
    return pack(x.detach(), CODEC, torch.zeros(1, dtype=torch.int32)).unpack()


def oracle(layer: nn.Module, x: Tensor, rule: str, grad: Tensor) -> dict[str, Tensor]:
    """The formula on rows: (B, R, m) of every tensor, the affine spread over them."""
    if isinstance(layer, nn.GroupNorm):
        rows = (x.shape[0], layer.num_groups, -1)
        affine_shape = (1, layer.num_channels, *(1,) * (x.dim() - 2))
    else:
        rows = (x.shape[0], -1, math.prod(layer.normalized_shape))
        affine_shape = layer.normalized_shape
    wide = x.detach().double().reshape(rows)
    mean, variance = wide.mean(2, keepdim=True), wide.var(2, correction=0, keepdim=True)
    eps, centred = layer.eps, not isinstance(layer, nn.RMSNorm)
    if not centred:
        mean, variance = torch.zeros_like(mean), wide.square().mean(2, keepdim=True)
        eps = torch.finfo(x.dtype).eps if eps is None else eps
    hat = x_hat_of(x).reshape(rows) if rule == "pruned" else wide
    z = normalised(x.detach().reshape(rows), hat, mean, variance, eps, rule, (2,))
    weight = None if layer.weight is None else layer.weight.detach().double().view(affine_shape).expand(x.shape)
    return layer_norm_gradient(z, variance, eps, grad, weight, affine_shape, centred)


def crashes(layer: nn.Module, layout: str) -> bool:
    """Whether PyTorch itself ends the process in backward, dense or not: before 2.14 a GroupNorm whose input is
    channels_last and needs no gradient."""
    return (
        isinstance(layer, nn.GroupNorm) and layout == "channels_last" and Version(torch.__version__) < Version("2.14")
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_and_group_norm(name: str, rule: str) -> None:
    build, shape = LAYERS[name]
    plain = spread(build())
    for layout, x in layouts(torch.randn(shape) * 2 + 1).items():
        for trained in ("all", "input", "affine"):
            if trained == "affine" and (plain.weight is None or crashes(plain, layout)):
                continue
            ours = razored(plain, norm=rule).requires_grad_(trained != "input")
            x = x.detach().requires_grad_(trained != "affine")
            out = ours(x)
            assert_same_bits(f"forward, {layout}, {trained}", out, plain(x))
            wanted = {key: p for key, p in ours.named_parameters() if p.requires_grad}
            wanted |= {"input": x} if x.requires_grad else {}
            grad = torch.randn_like(out)
            got = dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), grad), strict=True))
            expected = oracle(plain, x, rule if keeps_by_rule(plain, x) else "dense", grad)
            for key, gradient in got.items():
                assert_close(f"{key}, {layout}, {trained}", gradient, expected[key].view(gradient.shape), 2e-5)


def keeps_by_rule(layer: nn.Module, x: Tensor) -> bool:
    """A GroupNorm of a strided input is dense."""
    return not isinstance(layer, nn.GroupNorm) or x.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_layer_norm_in_16_bits(rule: str, dtype: torch.dtype) -> None:
    plain = spread(nn.LayerNorm(64)).to(dtype)
    x = torch.randn(3, 5, 64).to(dtype).requires_grad_()
    ours = razored(plain, norm=rule)
    out = ours(x)
    assert_same_bits("forward", out, plain(x))
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, (x, ours.weight, ours.bias), grad)
    expected = oracle(plain, x, rule, grad)
    for key, gradient in zip(("input", "weight", "bias"), got, strict=True):
        limit = min(2 * LIMITS[dtype], 1e-2)  # PyTorch's kernel adds up in the input's own type
        assert_close(key, gradient, expected[key].view(gradient.shape), limit)


@pytest.mark.parametrize("rule", ["int8", "int4"])
def test_the_linear_after_a_norm_costs_nothing_and_reads_its_codes(rule: str) -> None:
    plain = nn.Sequential(spread(nn.LayerNorm(40)), nn.Linear(40, 12))
    ours, alone = razored(plain, norm=rule), razored(plain[0], norm=rule)
    x = torch.randn(4, 6, 40, requires_grad=True)
    sizes = []
    for model in (ours, alone):
        with br.memory.ledger(model) as book:
            out = model(x)
        sizes.append(book.total_bytes)
    assert sizes[0] == sizes[1]
    out = ours(x)
    grad = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, ours[1].weight, grad)
    mean, variance = x.double().mean(2, keepdim=True), x.double().var(2, correction=0, keepdim=True)
    z = normalised(x, x, mean, variance, plain[0].eps, rule, (2,))
    x_hat = z * plain[0].weight.double() + plain[0].bias.double()
    assert_close("weight", got, grad.double().flatten(0, 1).T @ x_hat.flatten(0, 1), 1e-5)


class QuickGELU(nn.Module):
    """Written out, for the oracle."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize("kept", ["float16", "int8", "int4", "int2"])
def test_quick_gelu(kept: str) -> None:
    layers = pytest.importorskip("timm.layers.activations")
    plain = layers.QuickGELU()
    table = quantiser("quick_gelu", int(kept.removeprefix("int"))) if kept.startswith("int") else None
    for layout, x in layouts(torch.randn(3, 5, 7, 9) * 3).items():
        x = x.detach().requires_grad_()
        out = razored(plain, activation=kept)(x)
        assert_same_bits(f"forward, {layout}", out, plain(x))
        grad = torch.randn_like(out)
        (got,) = torch.autograd.grad(out, x, grad)
        assert_close(f"gradient, {layout}", got, activation_gradient(QuickGELU(), x, kept, table, grad), 1e-5)


SCALES = {"LayerScale": ((3, 7, 12), (12,)), "LayerScale2d": ((2, 6, 5, 4), (1, 6, 1, 1))}


@pytest.mark.parametrize("name", SCALES)
def test_layer_scale(name: str) -> None:
    layers = pytest.importorskip("timm.layers")
    shape, gate_shape = SCALES[name]
    plain = spread(getattr(layers, name)(shape[2 if name == "LayerScale" else 1]))
    for layout, x in layouts(torch.randn(shape)).items():
        x = x.detach().requires_grad_()
        ours = razored(plain)
        out = ours(x)
        assert_same_bits(f"forward, {layout}", out, plain(x))
        grad = torch.randn_like(out)
        got = torch.autograd.grad(out, (x, ours.gamma), grad)
        expected = channel_scale_at(x_hat_of(x), plain.gamma.view(gate_shape), grad)
        for key, gradient, wanted in zip(("input", "gamma"), got, expected, strict=True):
            assert_close(f"{key}, {layout}", gradient, wanted.view(gradient.shape), 1e-5)


class Branch(nn.Module):
    """Scales what its Linear gives, as ConvNeXt's blocks do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(width))
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.linear(x) * 2


def test_a_block_that_scales_its_branch() -> None:
    plain, x = Branch(24), torch.randn(3, 8, 24)
    ours = copy.deepcopy(plain)
    br.razor_(ours, br.RazorConfig(0.8, values="float32", fill="zero"))
    with br.memory.ledger(ours) as book:
        out = ours(x)
    assert {row.module for row in book.rows if row.role == "pruned values"} == {"", "linear"}
    assert all(row.reason == "gate" for row in book.rows if row.role == "dense")
    assert_same_bits("forward", out, plain(x))
    grad = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, ours.gamma, grad)
    expected = (2 * grad.double() * x_hat_of(plain.linear(x))).sum((0, 1))
    assert_close("gamma", got, expected, 1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"stride": 1, "padding": 1}, {"ceil_mode": True}, {"padding": 1, "count_include_pad": False}],
    ids=str,
)
def test_average_pooling_keeps_a_shape(settings: dict) -> None:
    plain = nn.AvgPool2d(3, **settings)
    ours = nn.Sequential(copy.deepcopy(plain))
    br.razor_(ours, br.RazorConfig(0.9))
    for layout, x in layouts(torch.randn(2, 3, 8, 9)).items():
        x = x.detach().requires_grad_()
        with br.memory.ledger(ours) as book:
            out = ours(x)
        assert book.total_bytes == 0
        assert_same_bits(f"forward, {layout}", out, plain(x))
        grad = torch.randn_like(out)
        (got,), (expected,) = (torch.autograd.grad(y, x, grad) for y in (out, plain(x)))
        assert_same_bits(f"gradient, {layout}", got, expected)


def test_what_else_a_block_does_keeps_next_to_nothing() -> None:
    """Stochastic depth one number per sample; position embedding, class token and pooling nothing."""
    timm_models = pytest.importorskip("timm.models")
    model = timm_models.VisionTransformer(
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=3,
        drop_path_rate=0.5,
        global_pool="avg",
    )
    br.razor_(model, br.RazorConfig(0.9))
    with br.memory.ledger(model) as book:
        loss = F.cross_entropy(model(torch.randn(6, 3, 16, 16)), torch.arange(6) % 3)
    rows = {(row.module, row.reason): row.bytes for row in book.rows if row.role == "dense"}
    reasons = {"reciprocal deviation", "mean over the tokens"}
    others = {key: size for key, size in rows.items() if key[1] not in reasons}
    assert [others.pop((f"blocks.1.drop_path{i}", "saved by DropPath")) for i in (1, 2)] == [6 * 4] * 2
    assert {module for module, _ in others} == {""}  # the loss
    del loss
