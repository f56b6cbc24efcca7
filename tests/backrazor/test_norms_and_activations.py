"""Norms and activations against the formulas of tests/oracles.py, and chains that run as one operator."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import backrazor as br
from backrazor.codecs import Pruned, pack
from backrazor.codecs.smooth import quantiser
from tests.backrazor.compare import LIMITS, assert_close, assert_same_bits
from tests.backrazor.samples import layouts
from tests.oracles import (
    activation_gradient,
    batch_norm_gradient,
    clamp_gradient,
    frozen_batch_norm_gradient,
    normalised,
    vjp_at,
)

NORM_RULES = ("dense", "pruned", "bfloat16", "int8", "int4")
CODEC = Pruned(0.8, "float32", "auto")


def batch_norm(shape: tuple[int, ...], training: bool) -> nn.Module:
    """A BatchNorm whose parameters and statistics are not the initial ones."""
    layer = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(shape[1])
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.normal_()
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)
    return layer.train(training)


def razored(layer: nn.Module, **fields: object) -> nn.Module:
    copied = copy.deepcopy(layer)
    br.razor_(copied, br.RazorConfig(**({"sparsity": 0.8, "values": "float32", "fill": "zero"} | fields)))
    return copied


def x_hat_of(x: Tensor) -> Tensor:
    return pack(x.detach(), CODEC, torch.zeros(1, dtype=torch.int32)).unpack()


@pytest.mark.parametrize("training", [False, True], ids=["running statistics", "batch statistics"])
@pytest.mark.parametrize("rule", NORM_RULES)
@pytest.mark.parametrize("shape", [(5, 7, 6, 9), (9, 7), (4, 3, 17)], ids=str)
def test_batch_norm(shape: tuple[int, ...], rule: str, training: bool) -> None:
    if rule == "dense" and training and len(shape) == 2:
        pytest.skip("covered by the other shapes")
    plain = batch_norm(shape, training)
    for layout, x in layouts(torch.randn(shape) * 2 + 1).items():
        for trained in ("all", "input", "affine"):
            ours, theirs = razored(plain, norm=rule), copy.deepcopy(plain)
            ours.requires_grad_(trained != "input")
            x = x.detach().requires_grad_(trained != "affine")
            check_norm(f"{rule}, {layout}, {trained}", ours, theirs, x, rule)


def check_norm(name: str, ours: nn.Module, theirs: nn.Module, x: Tensor, rule: str) -> None:
    out = ours(x)
    assert_same_bits(f"forward, {name}", out, theirs(x))
    for key, buffer in theirs.named_buffers():
        assert_same_bits(f"{key}, {name}", ours.get_buffer(key), buffer)
    wanted = {key: p for key, p in ours.named_parameters() if p.requires_grad} | (
        {"input": x} if x.requires_grad else {}
    )
    grad = torch.randn_like(out)
    got = dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), grad), strict=True))
    # of vectors a row is the sample, in 8 bits whatever the rule
    oracle = norm_oracle(theirs, x, "int8" if rule == "int4" and x.dim() == 2 else rule, grad)
    for key, gradient in got.items():
        assert_close(f"{key}, {name}", gradient, oracle[key], 2e-5)


def norm_oracle(layer: nn.Module, x: Tensor, rule: str, grad: Tensor) -> dict[str, Tensor]:
    dims, channel = (0, *range(2, x.dim())), (1, -1, *(1,) * (x.dim() - 2))
    wide = x.detach().double()
    mean = wide.mean(dims) if layer.training else layer.running_mean.double()
    variance = wide.var(dims, correction=0) if layer.training else layer.running_var.double()
    rows = tuple(range(2, x.dim())) or (1, 2)  # of vectors a row is the sample
    given = x.detach() if x.dim() > 2 else x.detach().unsqueeze(2)
    given_hat, channel = (x_hat_of(x).view(given.shape), channel if x.dim() > 2 else (1, -1, 1))
    z = normalised(given, given_hat, mean.view(channel), variance.view(channel), layer.eps, rule, rows).view(x.shape)
    formula = batch_norm_gradient if layer.training else frozen_batch_norm_gradient
    return formula(z, variance, layer.weight, layer.eps, grad)


def test_int_rules_of_a_norm_are_close_to_dense_but_not_equal() -> None:
    plain, x = batch_norm((8, 6, 9, 9), True), torch.randn(8, 6, 9, 9)
    grad = torch.randn_like(x)
    errors = []
    for rule in ("int4", "int8", "dense"):
        leaf = x.clone().requires_grad_()
        razored(plain, norm=rule)(leaf).backward(grad)
        exact = x.clone().requires_grad_()
        copy.deepcopy(plain)(exact).backward(grad)
        errors.append(float((leaf.grad - exact.grad).norm() / exact.grad.norm()))
    assert errors[0] > errors[1] > errors[2] == 0
    assert errors[0] < 0.05


@pytest.mark.parametrize("rule", ["int8", "int4"])
def test_a_batch_norm_over_tokens_keeps_a_scale_per_token(rule: str) -> None:
    """As in LeViT: tokens are samples, and a scale per element would take more than the element's code. Channels
    differ, so that 4 bits tell too little."""
    layer, x = razored(nn.BatchNorm1d(32), norm=rule), torch.randn(40, 32, requires_grad=True)
    with br.memory.ledger(layer) as book:
        out = layer(x)
    assert out.requires_grad
    rows = {row.role: row.bytes for row in book.rows}
    assert rows["quantised"] == 40 * 32 and rows["scales"] == 40 * 2


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_keeps_its_books(momentum: float | None) -> None:
    plain = nn.BatchNorm2d(4, momentum=momentum)
    ours = razored(plain, norm="int8")
    for _ in range(3):
        x = torch.randn(3, 4, 5, 5, requires_grad=True)
        ours(x).sum().backward()
        plain(x)
    for key, buffer in plain.named_buffers():
        assert_same_bits(key, ours.get_buffer(key), buffer)


def test_batch_norm_without_affine_or_statistics() -> None:
    for settings in (
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
    ):
        for training in (True, False):
            plain = nn.BatchNorm2d(4, **settings).train(training)
            ours, x = razored(plain, norm="int8"), torch.randn(3, 4, 5, 5, requires_grad=True)
            out = ours(x)
            assert_same_bits(f"{settings}, {training}", out, plain(x))
            (got,) = torch.autograd.grad(out, x, torch.ones_like(out) + x.detach() ** 2)
            (expected,) = torch.autograd.grad(plain(x), x, torch.ones_like(out) + x.detach() ** 2)
            assert_close(f"{settings}, {training}", got, expected, 1e-2)


def test_one_value_a_channel_is_refused_as_by_torch() -> None:
    ours = razored(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ours(torch.randn(1, 3, 1, 1, requires_grad=True))


@pytest.mark.parametrize("rule", ["int8", "int4", "pruned"])
@pytest.mark.parametrize("build", [lambda: nn.BatchNorm2d(4).eval(), lambda: nn.LayerNorm(6)], ids=["batch", "layer"])
def test_an_empty_batch_passes(build, rule: str) -> None:
    plain, x = build(), torch.zeros(0, 4, 6, 6, requires_grad=True)
    out = razored(plain, norm=rule)(x)
    assert_same_bits("forward", out, plain(x))
    out.sum().backward()
    assert x.grad.shape == x.shape


PIECEWISE = {"relu": (nn.ReLU, 0.0, torch.inf), "relu6": (nn.ReLU6, 0.0, 6.0), "hardtanh": (nn.Hardtanh, -1.0, 1.0)}
SMOOTH = {"gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU("tanh"), "silu": nn.SiLU, "hardswish": nn.Hardswish}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("name", PIECEWISE)
def test_piecewise_linear(name: str, dtype: torch.dtype, inplace: bool) -> None:
    build, low, high = PIECEWISE[name]
    for layout, x in layouts((torch.randn(3, 5, 7, 9) * 4).to(dtype)).items():
        x = x.detach().requires_grad_()
        out = razored(build(inplace=inplace))(x.clone(memory_format=torch.preserve_format))
        assert_same_bits(f"forward, {layout}", out, build()(x))
        grad = torch.randn_like(out)
        (got,) = torch.autograd.grad(out, x, grad)
        assert_same_bits(f"gradient, {layout}", got.double(), clamp_gradient(x, low, high, grad) + 0.0)


@pytest.mark.parametrize("kept", ["dense", "float16", "int8", "int4", "int2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SMOOTH)
def test_smooth(name: str, dtype: torch.dtype, kept: str) -> None:
    plain = SMOOTH[name]()
    table = quantiser(name, int(kept.removeprefix("int"))) if kept.startswith("int") else None
    for layout, x in layouts((torch.randn(3, 5, 7, 9) * 3).to(dtype)).items():
        x = x.detach().requires_grad_()
        layer = nn.Sequential(
            copy.deepcopy(plain), nn.ReLU()
        )  # ReLU so that there is something to convert under "dense"
        br.razor_(layer, br.RazorConfig(activation=kept))
        out = layer[0](x)
        assert_same_bits(f"forward, {layout}", out, plain(x))
        grad = torch.randn_like(out)
        (got,) = torch.autograd.grad(out, x, grad)
        assert_close(f"gradient, {layout}", got, activation_gradient(plain, x, kept, table, grad), LIMITS[dtype])


@pytest.mark.parametrize("kept", ["float16", "int8", "int4", "int2"])
@pytest.mark.parametrize("build", [nn.SiLU, nn.Hardswish])
def test_smooth_in_place(build: type, kept: str) -> None:
    ours, theirs = razored(build(inplace=True), activation=kept), razored(build(), activation=kept)
    x = torch.randn(4, 33, requires_grad=True)
    outs = [layer(x * 1) for layer in (ours, theirs)]
    assert_same_bits("forward", *outs)
    assert_same_bits("gradient", *(torch.autograd.grad(out, x, torch.ones_like(out))[0] for out in outs))


def test_double_precision_needs_a_dense_activation() -> None:
    layer = razored(nn.GELU(), activation="int4")
    with pytest.raises(TypeError, match="use activation='dense'"):
        layer(torch.randn(2, 3, dtype=torch.float64, requires_grad=True))


ENDS = {
    "none": (lambda: None, lambda y, grad: grad.double()),
    "relu": (nn.ReLU, lambda y, grad: clamp_gradient(y, 0.0, torch.inf, grad)),
    "relu6": (nn.ReLU6, lambda y, grad: clamp_gradient(y, 0.0, 6.0, grad)),
    "hardtanh": (nn.Hardtanh, lambda y, grad: clamp_gradient(y, -1.0, 1.0, grad)),
    "silu": (nn.SiLU, lambda y, grad: activation_gradient(nn.SiLU(), y, "int4", quantiser("silu", 4), grad)),
    "hardswish": (
        nn.Hardswish,
        lambda y, grad: activation_gradient(nn.Hardswish(), y, "int4", quantiser("hardswish", 4), grad),
    ),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("chunk_bytes", [1, 8 << 20])
@pytest.mark.parametrize(
    "settings", [{"padding": 1}, {"padding": "same", "groups": 2}, {"stride": 2, "bias": False}], ids=str
)
def test_conv_norm_act_as_one(settings: dict, chunk_bytes: int, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backrazor.functional.common.CHUNK_BYTES", chunk_bytes)
    activation = ENDS[end][0]()
    for dtype in (torch.float32, torch.bfloat16):
        conv, norm = nn.Conv2d(4, 6, 3, **settings), batch_norm((1, 6, 1, 1), False).requires_grad_(False)
        plain = nn.Sequential(conv, norm, *([] if activation is None else [activation])).to(dtype)
        ours = copy.deepcopy(plain)
        assert br.razor_(ours, br.RazorConfig(0.7, values="float32", fill="zero", activation="int4")).fused == 1
        x = torch.randn(5, 4, 9, 8).to(dtype).requires_grad_()
        out = ours(x)
        assert_same_bits("forward", out, plain(x))
        grad = torch.randn_like(out)
        wanted = {"input": x, **{f"0.{key}": p for key, p in ours[0].named_parameters()}}
        got = dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), grad), strict=True))
        x_hat = pack(x.detach(), ours[0].razor.pruned, torch.zeros(1, dtype=torch.int32)).unpack()
        before = ENDS[end][1](plain[:2](x), grad)
        oracle = vjp_at(plain[:2], x_hat, before)
        for key, gradient in got.items():
            assert_close(f"{key}, {dtype}", gradient, oracle[key], LIMITS[dtype])
