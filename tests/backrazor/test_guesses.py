"""What stands for dropped elements: means, bits of activations, averages of blocks."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import backrazor as br
from backrazor.codecs import (
    Bits,
    Pruned,
    Use,
    activation_of,
    kept_count,
    pack,
    pack_derivative,
    remember_activation,
)
from backrazor.codecs.averaged import Averaged, AveragedForm
from backrazor.codecs.derivative import Levels
from backrazor.codecs.guessed import Guessed, GuessedForm
from backrazor.codecs.inputs import CHANNELS, FEATURES, pack_input
from backrazor.codecs.products import window_sums
from backrazor.codecs.smooth import ACTIVATIONS, outputs, quantiser
from backrazor.kernels import Window
from tests.backrazor.compare import assert_close

FILLED = {"values": "int4", "fill": "known", "activation": "auto"}


def relative_error(x: Tensor, x_hat: Tensor) -> float:
    return float((x - x_hat).norm() / x.norm())


@pytest.mark.parametrize("sparsity", [0.9, 0.99, 0.995, 0.999])
def test_the_guess_is_the_mean_and_the_kept_are_the_largest_differences(sparsity: float, flag: Tensor) -> None:
    x = torch.randn(3, 6, 20, 21) + torch.arange(6.0).view(1, 6, 1, 1)
    packed = Guessed(Pruned(sparsity, "float32"), False).pack(x, flag)
    guess = packed.form.guess(packed.tensors, 0, 3)
    assert_close("means", guess, x.mean((2, 3)), 1e-2)
    difference = (x - guess[:, :, None, None]).flatten(1)
    keep = kept_count(difference.shape[1], sparsity)
    at = difference.abs().topk(keep, 1).indices
    expected = torch.zeros_like(difference).scatter_(1, at, difference.gather(1, at))
    assert_close("x_hat", packed.unpack(), expected.view(x.shape) + guess[:, :, None, None], 1e-6)


def test_tokens_have_a_mean_per_feature(flag: Tensor) -> None:
    x = torch.randn(3, 17, 24) + torch.arange(24.0)
    packed = Guessed(Pruned(0.9, "int4"), True).pack(x, flag)
    assert_close("means", packed.form.guess(packed.tensors, 1, 3), x[1:].mean(1), 1e-2)
    zero = pack(x, Pruned(0.9, "int4"), flag)
    assert relative_error(x, packed.unpack()) < 0.5 * relative_error(x, zero.unpack())


@pytest.mark.parametrize("high", [math.nan, 6.0])
def test_what_an_activation_made_zero_is_known(high: float, flag: Tensor) -> None:
    x = torch.randn(2, 8, 12, 12).mul_(4).clamp_(min=0, max=6 if high == 6 else None)
    bits = Bits(0.0, high)
    mask = pack_derivative(x, bits)
    packed = Guessed(Pruned(0.97, "float32"), False, bits).pack(x, flag, mask.tensors[0])
    inside = (x > 0) & ~(x >= high)
    x_hat = packed.unpack()
    kept = pack_kept(packed)
    assert not x_hat[~inside & ~kept].any()
    means = (x * inside).sum((2, 3)) / inside.sum((2, 3))
    guessed = inside & ~kept
    expected = means[:, :, None, None].expand_as(x)[guessed]
    assert_close("guessed", x_hat[guessed], expected, 1e-2)


def pack_kept(packed) -> Tensor:
    """Which elements are kept."""
    form = packed.form.pruned
    values = form.read(packed.tensors[: form.count], 0, packed.form.shape[0], torch.float32)
    return values != 0


@pytest.mark.parametrize("name, word", [("gelu", "int2"), ("silu", "int4"), ("hardswish", "int4")])
@pytest.mark.parametrize("features", [True, False])
def test_codes_of_a_smooth_activation_are_the_guess(name: str, word: str, features: bool, flag: Tensor) -> None:
    """x_hat is the row's number times what the element's code stands for, and the largest differences from it."""
    shape = (2, 50, 24) if features else (2, 24, 9, 9)
    before = torch.randn(shape, requires_grad=True)
    x = br.functional.smooth(before, name, word, flag)
    codec, weight = Pruned(0.9, "float32", fill="known"), torch.empty(8, 24) if features else torch.empty(8, 24, 3, 3)
    packed = pack_input(x, codec, Use.of(weight), activation_of(x), flag)
    form = packed.form
    bits = int(word.removeprefix("int"))
    assert form.known == Levels(name, bits) and not form.masked
    thresholds, _ = quantiser(name, bits)
    level = outputs(name, bits)[torch.bucketize(before.detach(), thresholds, right=True)]
    dims = 1 if features else (2, 3)
    factor = (x * level).sum(dims) / level.square().sum(dims)
    stored = form.guess(packed.tensors, 0, 2)
    assert_close("factors", stored, factor.detach(), 1e-2)
    guess = level * (stored[:, None] if features else stored[:, :, None, None])
    difference = (x.detach() - guess).flatten(1)
    at = difference.abs().topk(kept_count(difference.shape[1], 0.9), 1).indices
    kept = torch.zeros_like(difference).scatter_(1, at, difference.gather(1, at))
    assert_close("x_hat", packed.unpack(), guess + kept.view(shape), 1e-5)
    means = Guessed(codec, features).pack(x, flag)
    assert relative_error(x.detach(), packed.unpack()) < 0.6 * relative_error(x.detach(), means.unpack())


@pytest.mark.parametrize("build", [nn.ReLU, nn.ReLU6])
def test_tokens_behind_a_relu_are_zero_where_it_made_them_zero(build: type[nn.Module], flag: Tensor) -> None:
    """The gradient is the dense one at x_hat, and x_hat knows the zeros."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(24, 48), build(), nn.Linear(48, 8)), torch.randn(3, 30, 24) * 4
    br.razor_(model, br.RazorConfig(0.9, values="float32"))
    y = model[1](model[0](x))
    packed = pack_input(y, model[2].razor.pruned, FEATURES, activation_of(y), flag)
    assert packed.form.masked
    y, x_hat, kept = y.detach(), packed.unpack(), pack_kept(packed)
    active = (y > 0) & ~(y >= 6) if build is nn.ReLU6 else y > 0
    assert not x_hat[~active & ~kept].any()
    assert relative_error(y, x_hat) < 0.7 * relative_error(
        y, Guessed(model[2].razor.pruned, True).pack(y, flag).unpack()
    )
    out = model(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    assert_close("weight", model[2].weight.grad, torch.einsum("bto,bti->oi", grad, x_hat), 1e-5)


def test_what_a_code_stands_for_is_the_mean_output_of_its_interval() -> None:
    x = torch.linspace(-6, 6, 600_001, dtype=torch.float64)
    weight = torch.exp(-0.5 * x.square())
    for name in ("gelu", "gelu_tanh", "silu", "quick_gelu", "hardswish"):
        for bits in (2, 4):
            interval = torch.bucketize(x, quantiser(name, bits)[0].double(), right=True)
            y = ACTIVATIONS[name].forward(x)
            expected = [float((y * weight)[interval == i].sum() / weight[interval == i].sum()) for i in range(2**bits)]
            assert_close(f"{name} in {bits} bits", outputs(name, bits), torch.tensor(expected), 2e-3)


def test_codes_reach_the_linear_layer_behind_and_pass_a_gate() -> None:
    """A razored MLP, as modules in a row and as a chain, and a squeeze-and-excitation block."""
    model = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 8))
    x = torch.randn(3, 20, 24)
    br.razor_(model, br.RazorConfig(0.9))
    with br.memory.ledger(model) as ledger:
        loss = model(x).sum()
    loss.backward()
    roles = [(row.module, row.role) for row in ledger.rows]
    assert ("2", "means") in roles and sum(role == "quantised" for _, role in roles) == 1
    y = torch.randn(2, 16, 8, 8, requires_grad=True)
    flag = torch.zeros(1, dtype=torch.int32)
    out = br.functional.smooth(y, "silu", "int4", flag)
    gate = torch.rand(2, 16, 1, 1, requires_grad=True)
    scaled = br.functional.channel_scale(out, gate, Pruned(0.9, "int4", fill="known"), flag)
    assert activation_of(scaled).of(scaled) == Levels("silu", 4)
    assert activation_of(out).of(out[:1]) is None and activation_of(out).of(out.mT) is None


def test_averages_repeat_and_sums_are_their_transpose(flag: Tensor) -> None:
    x = torch.randn(2, 3, 33, 30)
    packed = Averaged(14).pack(x, flag)
    form = packed.form
    assert form.block == (3, 3)
    averages = F.avg_pool2d(x, 3, ceil_mode=True)
    assert relative_error(averages, form.read_averages(packed.tensors, 0, 2, torch.float32)) < 0.2
    y = torch.randn_like(x)
    through = (packed.unpack() * y).sum()
    assert_close(
        "transpose", (form.read_averages(packed.tensors, 0, 2, torch.float32) * form.sums(y)).sum(), through, 1e-5
    )


@pytest.mark.parametrize(
    "kernel, stride, padding, dilation",
    [((3, 3), (1, 1), (1, 1), (1, 1)), ((3, 5), (2, 1), (0, 3), (1, 1)), ((3, 3), (2, 3), (2, 2), (2, 1))],
)
def test_window_sums_are_the_gradient_for_an_input_of_ones(kernel, stride, padding, dilation) -> None:
    ones, weight = torch.ones(2, 1, 9, 8), torch.randn(4, 1, *kernel, requires_grad=True)
    for sample in range(2):
        out = F.conv2d(ones[sample : sample + 1], weight, None, stride, padding, dilation)
        grad = torch.randn_like(out)
        (expected,) = torch.autograd.grad(out, weight, grad)
        window = Window((1, 9, 8), kernel, stride, padding, dilation, False)
        assert_close("sums", window_sums(grad, window)[0], expected.squeeze(1), 1e-5)


def test_the_form_follows_from_what_the_input_is(flag: Tensor) -> None:
    codec = Pruned(0.9, "int4", fill="known")
    wide, narrow = torch.empty(64, 16, 1, 1), torch.empty(8, 16, 1, 1)
    kernel, features = torch.empty(8, 16, 3, 3), torch.empty(8, 16)
    x = torch.randn(2, 16, 30, 30).relu_()

    def form(x: Tensor, weight: Tensor, codec: Pruned = codec):
        return pack_input(x, codec, Use.of(weight), activation_of(x), flag).form

    assert isinstance(form(x, narrow), AveragedForm)
    sparser = Pruned(0.99, "int4", fill="known")
    assert form(x, narrow).block == (1, 1) and form(x, narrow, sparser).block == (6, 6)
    assert form(x, kernel).block == (1, 1) and form(x, kernel).stored.values == "int4"
    assert form(x[:, :3], torch.empty(8, 3, 3, 3)).stored.values == "int8"  # an image
    remember_activation(x, pack_derivative(x, Bits()))
    assert form(x, narrow).masked
    assert form(x, wide).masked and form(x, kernel).masked
    assert form(x, torch.empty(16, 1, 3, 3)).masked and not form(x, torch.empty(16, 1, 5, 5)).masked
    assert isinstance(form(x.clone(), narrow), AveragedForm)  # another tensor: nothing is known of it
    assert not form(x, narrow, Pruned(0.9, "int4", fill="mean")).masked
    assert not isinstance(form(x, narrow, Pruned(0.9, "int4")), GuessedForm)
    x.add_(1)  # the note was about what x held
    assert isinstance(form(x, narrow), AveragedForm)
    assert form(torch.randn(2, 17, 16), features).features
    assert not isinstance(form(torch.randn(2, 16), features), GuessedForm)
    small = form(torch.randn(2, 16, 1, 1), narrow)
    assert (small.values, small.index) == ("int8", "none")
    assert FEATURES.features and not CHANNELS.features


class Block(nn.Module):
    """An inverted residual between a stem and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4),
            nn.Conv2d(4, 24, 1), nn.BatchNorm2d(24), nn.ReLU6(), nn.Conv2d(24, 24, 3, 1, 1, groups=24),
            nn.BatchNorm2d(24), nn.ReLU6(), nn.Conv2d(24, 8, 1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(8, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def smooth_images(count: int, side: int) -> Tensor:
    return F.interpolate(torch.randn(count, 3, 8, 8), side, mode="bilinear")


def frozen(model: nn.Module) -> nn.Module:
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return model


@pytest.mark.parametrize("sparsity", [0.9, 0.97, 0.99])
def test_the_gradient_keeps_its_direction_where_zeros_lose_it(sparsity: float) -> None:
    torch.manual_seed(0)
    model, x, y = frozen(Block()), smooth_images(8, 64), torch.arange(8)

    def cosine(**fields: object) -> float:
        loss = lambda out: F.cross_entropy(out, y)  # noqa: E731
        return br.compare_gradients(model, x, loss, br.RazorConfig(sparsity, **fields)).cosine

    assert cosine(**FILLED) > 0.95
    assert cosine(**FILLED) > cosine(fill="zero") + 0.02


def test_predicted_saved_and_checkpointed_bytes_agree() -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = frozen(Block()), smooth_images(4, 64)
    br.razor_(model, br.RazorConfig(0.9, **FILLED))
    with br.memory.ledger(model) as ledger:
        loss = model(x).sum()
    assert ledger.total_bytes == br.memory.predict(model, (3, 64, 64), 4, loss_fn=torch.sum).saved_bytes
    assert "means" in {row.role for row in ledger.rows}
    loss.backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).sum().backward()
    for got, grad in zip((p.grad for p in model.parameters() if p.grad is not None), wanted, strict=True):
        assert torch.equal(got, grad)


def test_a_mean_that_is_not_finite_raises_the_flag() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4 * 36, 2))
    br.razor_(model, br.RazorConfig(0.9, **FILLED))
    x = torch.randn(2, 3, 8, 8)
    model(x).sum().backward()
    br.check_finite(model)
    x[0, 0, 0, 0] = math.inf
    model(x).sum().backward()
    with pytest.raises(FloatingPointError):
        br.check_finite(model)


def test_more_sparsity_saves_more_and_none_of_it_is_lost_near_one() -> None:
    model = frozen(Block())
    found = []
    for sparsity in (0.9, 0.97, 0.99, 0.995, 0.999):
        br.razor_(model, br.RazorConfig(sparsity, **FILLED))
        found.append(br.memory.predict(model, (3, 64, 64), 4).saved_bytes)
        br.unrazor_(model)
    assert all(more > less for more, less in pairwise(found))


@pytest.mark.parametrize("fill", ["mean", "known"])
def test_kept_energy_counts_what_is_stored_not_what_is_guessed(fill: str) -> None:
    model = frozen(Block())
    br.razor_(model, br.RazorConfig(0.97, **(FILLED | {"fill": fill})))
    with br.kept_energy(model) as energy:
        model(smooth_images(4, 64)).sum().backward()
    rows = {row.module: row for row in energy.rows}
    assert 0.96 < rows["body.3"].sparsity < 0.98  # reads a ReLU6
    assert 0.8 < rows["body.5"].sparsity < 0.9  # averages of 3 x 3 of 32 x 32
    assert rows["body.3"].kept_energy > 0.5


def test_frames_of_a_video_are_averaged_like_images() -> None:
    """A clip that no activation made: the weight's gradient is that at its frames' averages."""
    torch.manual_seed(0)
    layer, x = nn.Conv3d(3, 4, 3, padding=1), torch.randn(2, 3, 4, 20, 20)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(4 * 4 * 20 * 20, 2))
    plain = copy.deepcopy(layer)
    br.razor_(model, br.RazorConfig(0.9995))  # 8 x 8 averages for kernels of several positions
    caught: list[torch.Tensor] = []
    model[0].register_forward_hook(lambda module, inputs, out: out.register_hook(caught.append) and None)
    model(x).square().sum().backward()
    block = Averaged(8, "int8").form(x.flatten(1, 2)).block
    averages = F.avg_pool2d(x.flatten(1, 2), block, ceil_mode=True)
    x_hat = averages.repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)[..., :20, :20].view(x.shape)
    plain(x_hat).backward(caught[0])
    assert_close("weight", model[0].weight.grad, plain.weight.grad, 1e-2)


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_the_classifier_of_any_convolutional_network_is_kept_whole(conv: type[nn.Module]) -> None:
    """It has most of the gradient: with a pruned one torchvision's mc3 had a cosine of 0.39, with a whole one 0.999."""
    model = nn.Sequential(
        conv(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 ** (conv(1, 1, 1).weight.dim() - 2), 2)
    )
    report = br.razor_(model, br.RazorConfig(0.9))
    assert "int8" in report.replaced[-1].keeps and "0.9" not in report.replaced[-1].keeps
