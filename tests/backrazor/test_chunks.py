"""Blocks that run some samples at a time: the same numbers as on all samples at once, and less memory in passing."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from ofa.imagenet_classification.networks.proxyless_nets import ProxylessNASNets
from ofa.utils.layers import ConvLayer, IdentityLayer, LinearLayer, MBConvLayer, ResidualBlock
from timm.layers import DropPath, SEModule
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, EdgeResidual, InvertedResidual, SqueezeExcite
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual as VisionInvertedResidual
from torchvision.models.resnet import Bottleneck as VisionBottleneck

import backrazor as br
from backrazor.nn import chunks, fusion


def downsample(channels: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


def convolutions(*more: nn.Module) -> nn.Sequential:
    first = nn.Conv2d(8, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)
    return nn.Sequential(*first, *more, nn.Conv2d(64, 8, 1, bias=False), nn.BatchNorm2d(8))


def squeezing(channels: int, **settings: object) -> SqueezeExcite:
    return SqueezeExcite(channels, 0.25, **settings)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "inverted residual": lambda: InvertedResidual(8, 8, exp_ratio=8.0),
    "with a gate": lambda: InvertedResidual(8, 8, exp_ratio=8.0, se_layer=squeezing),
    "separable": lambda: nn.Sequential(DepthwiseSeparableConv(64, 16), InvertedResidual(16, 16, exp_ratio=4.0)),
    "edge": lambda: EdgeResidual(8, 16, exp_ratio=8.0),
    "basic": lambda: nn.Sequential(BasicBlock(64, 64), BasicBlock(64, 64)),
    "bottleneck": lambda: nn.Sequential(Bottleneck(16, 16, downsample=downsample(16, 64, 1)), Bottleneck(64, 16)),
    "torchvision bottleneck": lambda: VisionBottleneck(64, 16, stride=2, downsample=downsample(64, 64, 2)),
    "torchvision inverted residual": lambda: VisionInvertedResidual(8, 8, 1, 8),
    "ofa": lambda: ResidualBlock(MBConvLayer(8, 8, 5, expand_ratio=8), IdentityLayer(8, 8)),
    "convolutions": convolutions,
}


def proxyless() -> nn.Module:
    """The first convolution and two blocks, as ofa builds them."""
    blocks = [MBConvLayer(16, 8, expand_ratio=1), MBConvLayer(8, 8, expand_ratio=6)]
    skips = [None, IdentityLayer(8, 8)]
    return ProxylessNASNets(
        ConvLayer(3, 16, stride=2, act_func="relu6"),
        [ResidualBlock(block, skip) for block, skip in zip(blocks, skips, strict=True)],
        ConvLayer(8, 16, 1, act_func="relu6"),
        LinearLayer(16, 5),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "timm efficientnet": lambda: timm.create_model("mobilenetv2_035", num_classes=5),
    "timm mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=5),
    "timm resnet": lambda: timm.create_model("resnet10t", stem_type="", num_classes=5),
    "torchvision resnet": lambda: torchvision.models.resnet18(num_classes=5),
    "ofa": proxyless,
}
CHANNELS = {"separable": 64, "basic": 64, "bottleneck": 16, "torchvision bottleneck": 64}


def frozen(block: nn.Module, channels: int, seed: int = 0) -> nn.Module:
    """The block behind a convolution, with fixed norms, and ready to train."""
    torch.manual_seed(seed)
    return ready(nn.Sequential(nn.Conv2d(3, channels, 1), block))


def ready(model: nn.Module) -> nn.Module:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    return model


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many chunks each call that runs in chunks has."""
    found: list[int] = []
    original = chunks._Run.chunked

    def chunked(run: chunks._Run, forward: Callable, x: Tensor) -> Tensor:
        found.append(len(run._bounds))
        return original(run, forward, x)

    monkeypatch.setattr(chunks._Run, "chunked", chunked)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield found
    torch.set_num_threads(threads)


def gradients(model: nn.Module, x: Tensor, passes: int = 1) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    out = model(leaf)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    for i in range(passes):
        out.float().mul(weights).sum().backward(retain_graph=i + 1 < passes)
    return out.detach(), [leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", ["compact", "paper"])
@pytest.mark.parametrize("name", BLOCKS)
def test_chunks_equal_all_samples_at_once(
    name: str, config: str, precision: str, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = frozen(BLOCKS[name](), CHANNELS.get(name, 8))
    br.razor_(model, getattr(br.RazorConfig, config)(0.9))
    x = torch.randn(7 if precision == "float32" else 14, 3, 72, 72)  # as many bytes
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        out, found = gradients(model, x, passes=2)
        assert runs and max(runs) > 1
        monkeypatch.setattr(chunks, "_may_be_cut", lambda x: False)
        expected_out, expected = gradients(model, x, passes=2)
    assert torch.equal(out, expected_out)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        bound = 5e-5 if precision == "float32" else 3e-2  # there a product of some samples is rounded to 16 bits
        assert (one - other).norm() <= bound * other.norm()


@pytest.mark.parametrize("name", ["inverted residual", "basic", "bottleneck"])
def test_what_is_saved_is_the_same(name: str, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that is handed from one run to the next is not kept twice."""
    model = frozen(nn.Sequential(BLOCKS[name](), BLOCKS[name]()), CHANNELS.get(name, 8))
    if name == "bottleneck":
        model = frozen(nn.Sequential(Bottleneck(64, 16), Bottleneck(64, 16)), 64)
    br.razor_(model, br.RazorConfig(0.9))
    x = torch.randn(7, 3, 72, 72)

    def saved() -> int:
        with br.memory.ledger(model) as book:
            loss = model(x).sum()
        del loss
        return book.total_bytes

    found = saved()
    assert runs
    monkeypatch.setattr(chunks, "_may_be_cut", lambda x: False)
    assert found == pytest.approx(saved(), rel=0.01)


def test_the_widest_tensors_never_exist_for_the_batch(runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen(nn.Sequential(*(InvertedResidual(8, 8, exp_ratio=8.0) for _ in range(3))), 8)
    br.razor_(model, br.RazorConfig(0.97))
    batch, side = 15, 96  # from 16 on, one thread takes another backend
    plane = batch * 8 * 8 * side * side * 4  # the expansion's output, bytes
    found = br.memory.predict(model, (3, side, side), batch)
    assert (found.peak_bytes - found.saved_bytes) / plane < 1
    monkeypatch.setattr(chunks, "_may_be_cut", lambda x: False)
    whole = br.memory.predict(model, (3, side, side), batch)
    assert (whole.peak_bytes - whole.saved_bytes) / plane > 2
    assert found.saved_bytes == whole.saved_bytes


def _train_a_norm(model: nn.Module) -> None:
    model[1].bn2.train()


def _hook(model: nn.Module) -> None:
    model[1].conv_dw.register_forward_hook(lambda module, inputs, output: None)


def _patch(model: nn.Module) -> None:
    model[1].bn2.forward = lambda x: x - x.mean(0)


def _swap(model: nn.Module) -> None:
    model[1].aa = nn.Softmax(0)


def _drop_paths(model: nn.Module) -> None:
    model[1].drop_path = DropPath(0.5)


CHANGES = (_train_a_norm, _hook, _patch, _swap, _drop_paths)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_not_known_runs_on_all_samples(change: Callable[[nn.Module], None], runs: list[int]) -> None:
    model = frozen(InvertedResidual(8, 8, exp_ratio=8.0), 8)
    br.razor_(model, br.RazorConfig(0.9))
    x = torch.randn(7, 3, 72, 72)
    model(x)
    assert runs
    runs.clear()
    change(model)
    model(x).sum().backward()
    assert not runs


def test_hooks_of_all_modules_see_all_samples(runs: list[int]) -> None:
    model = frozen(InvertedResidual(8, 8, exp_ratio=8.0), 8)
    br.razor_(model, br.RazorConfig(0.9))
    seen: list[int] = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, inputs, out: seen.append(len(out)))
    try:
        model(torch.randn(7, 3, 72, 72))
    finally:
        hook.remove()
    assert not runs and set(seen) == {7}


def test_channels_last_runs_on_all_samples(runs: list[int]) -> None:
    """The convolution library rounds another batch otherwise there."""
    model = frozen(InvertedResidual(8, 8, exp_ratio=8.0), 8)
    br.razor_(model, br.RazorConfig(0.9))
    out = model(torch.randn(7, 3, 72, 72).contiguous(memory_format=torch.channels_last))
    assert not runs and out.is_contiguous(memory_format=torch.channels_last)


def test_a_forward_that_records_nothing_runs_on_all_samples(runs: list[int]) -> None:
    model = frozen(InvertedResidual(8, 8, exp_ratio=8.0), 8)
    br.razor_(model, br.RazorConfig(0.9))
    with torch.no_grad():
        model(torch.randn(7, 3, 72, 72))
    assert not runs


def test_a_gradient_cannot_be_differentiated_again(runs: list[int]) -> None:
    model = frozen(InvertedResidual(8, 8, exp_ratio=8.0), 8)
    br.razor_(model, br.RazorConfig(0.9))
    x = torch.randn(7, 3, 72, 72, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    assert runs
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        gradient.square().sum().backward()


def test_checkpointing_goes_round_chunks(runs: list[int]) -> None:
    model = frozen(nn.Sequential(InvertedResidual(8, 8, exp_ratio=8.0), InvertedResidual(8, 8, exp_ratio=8.0)), 8)
    br.razor_(model, br.RazorConfig(0.9))
    x = torch.randn(7, 3, 72, 72)
    _, expected = gradients(model, x)
    count = len(runs)

    def checkpointed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(model[1], model[0](x), use_reentrant=False)

    leaf = x.clone().requires_grad_()
    model.zero_grad()
    out = checkpointed(leaf)
    out.mul(torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert len(runs) == count + 2 * count  # the forward and its recomputation
    found = [leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_an_output_may_be_modified_in_place(runs: list[int]) -> None:
    model = frozen(InvertedResidual(8, 8, exp_ratio=8.0), 8)
    br.razor_(model, br.RazorConfig(0.9))
    x = torch.randn(7, 3, 72, 72, requires_grad=True)
    out = model(x)
    assert runs
    out += 1
    out.mul_(2).sum().backward()
    (twice,) = torch.autograd.grad(2 * model(x).sum(), x)
    torch.testing.assert_close(x.grad, twice)


def network(name: str, config: str = "compact") -> nn.Module:
    """A razored network of NETWORKS."""
    torch.manual_seed(0)
    model = ready(NETWORKS[name]())
    br.razor_(model, getattr(br.RazorConfig, config)(0.9))
    return model


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers and blocks of a network each call of its first layer ran."""
    found: list[int] = []
    original = fusion.run_in_chunks

    def run(forward: Callable, children: list[nn.Module], x: Tensor) -> tuple:
        count, out = original(forward, children, x)
        if forward is fusion._each and count:
            found.append(count)
        return count, out

    monkeypatch.setattr(fusion, "run_in_chunks", run)
    return found


@pytest.mark.parametrize("config", ["compact", "paper"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_runs_ahead_from_its_first_layer(
    name: str, config: str, runs: list[int], ahead: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(name, config)
    x = torch.randn(12, 3, 224, 224)
    out, found = gradients(model, x, passes=2)
    assert ahead and ahead[0] > 1
    monkeypatch.setattr(chunks, "_may_be_cut", lambda x: False)
    expected_out, expected = gradients(model, x, passes=2)
    assert torch.equal(out, expected_out)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


def _checkpoint(model: nn.Module) -> None:
    model.set_grad_checkpointing()


def _patch_features(model: nn.Module) -> None:
    forward = model.forward_features
    model.forward_features = lambda x: forward(x)


def _hook_stem(model: nn.Module) -> None:
    model.conv_stem.register_forward_hook(lambda module, inputs, output: None)


@pytest.mark.parametrize("change", [_checkpoint, _patch_features, _hook_stem], ids=lambda change: change.__name__)
def test_what_changes_the_calls_of_a_network_keeps_it_from_running_ahead(
    change: Callable[[nn.Module], None], runs: list[int], ahead: list[int]
) -> None:
    model = network("timm efficientnet")
    x = torch.randn(12, 3, 224, 224)
    expected, _ = gradients(model, x)
    assert ahead
    ahead.clear()
    change(model)
    out, _ = gradients(model, x)
    assert torch.equal(out, expected)
    assert not ahead


def test_a_hooked_block_ends_what_runs_ahead(runs: list[int], ahead: list[int]) -> None:
    """The hook sees the block's own input and output."""
    model = network("timm efficientnet")
    x = torch.randn(12, 3, 224, 224)
    expected, _ = gradients(model, x)
    whole = ahead[-1]
    seen = []
    model.blocks[1].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].shape, output.shape)))
    out, _ = gradients(model, x)
    assert torch.equal(out, expected)
    assert ahead[-1] < whole and seen[0][0] != seen[0][1] and len(seen[0][0]) == 4


def test_a_layer_called_by_itself_does_its_own_work(runs: list[int]) -> None:
    model = network("timm efficientnet")
    stem, x = model.conv_stem, torch.randn(12, 3, 224, 224)
    weight = stem.weight.detach()
    assert stem(x).shape[1] == weight.shape[0]
    y = torch.randn(7, weight.shape[0], 64, 64)
    block = model.blocks[0]
    assert not torch.equal(block(y), y)


class _Twice(timm.models.efficientnet.EfficientNet):
    """A forward that this library does not know."""

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv_stem(x) + 1)
        return super().forward_features(x[:, :3])


def test_a_network_of_another_forward_does_not_run_ahead(runs: list[int], ahead: list[int]) -> None:
    model = network("timm efficientnet")
    plain = timm.create_model("mobilenetv2_035", num_classes=5)
    plain.load_state_dict(model.state_dict())
    ready(plain)
    plain.__class__ = _Twice
    x = torch.randn(12, 3, 224, 224)
    with torch.no_grad():
        expected = plain(x)
    br.razor_(plain, br.RazorConfig(0.9))
    assert torch.equal(plain(x), expected)
    assert not ahead


def test_networks_saved_memory_in_passing(runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("timm efficientnet")
    found = br.memory.predict(model, (3, 224, 224), 12)
    monkeypatch.setattr(chunks, "_may_be_cut", lambda x: False)
    whole = br.memory.predict(model, (3, 224, 224), 12)
    assert found.peak_bytes < 0.6 * whole.peak_bytes
    assert found.saved_bytes <= 1.05 * whole.saved_bytes


def _vision() -> nn.Module:
    return torchvision.models.resnet18(num_classes=5)


def _a_norm_in_a_stage() -> nn.Module:
    model = _vision()
    model.layer1.append(nn.Sequential(nn.BatchNorm2d(64), nn.SiLU()))
    return model


def _a_convolution_in_a_stage() -> nn.Module:
    model = _vision()
    model.layer1[1] = nn.Conv2d(64, 64, 1)
    return model


def _one_block_twice() -> nn.Module:
    model = _vision()
    model.layer1 = nn.Sequential(model.layer1[0], model.layer1[0])
    return model


def _a_norm_in_an_identity() -> nn.Module:
    model = proxyless()
    model.blocks[1].shortcut = IdentityLayer(8, 8, use_bn=True)
    return model


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _a_computed_weight() -> nn.Module:
    model = _vision()
    nn.utils.parametrize.register_parametrization(model.layer1[0].conv1, "weight", _Doubled())
    return model


def _squeezing_by_a_maximum() -> nn.Module:
    squeezing = functools.partial(SEModule, add_maxpool=True)
    return timm.create_model("resnet18", num_classes=5, block_args={"attn_layer": squeezing})


ODD = (
    *(_a_norm_in_a_stage, _a_convolution_in_a_stage, _one_block_twice, _a_norm_in_an_identity, _a_computed_weight),
    _squeezing_by_a_maximum,
)
ODD_NAMES = {
    **{build.__name__.strip("_"): build for build in ODD},
    "resnetrs50": lambda: timm.create_model("resnetrs50", num_classes=5),
    "efficientnet_b0": lambda: timm.create_model("efficientnet_b0", num_classes=5, drop_path_rate=0.0),
}


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("name", ODD_NAMES)
def test_networks_that_are_not_as_they_come(name: str, hooked: bool, runs: list[int]) -> None:
    """Dense outputs, to the bit, and gradients that stay near the dense ones."""
    torch.manual_seed(0)
    model = ready(ODD_NAMES[name]())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    if name == "a_norm_in_an_identity":
        model.blocks[1].shortcut.train()
    if hooked and hasattr(model, "layer2"):
        model.layer2.register_forward_hook(lambda module, inputs, output: None)
    model.eval() if name == "efficientnet_b0" else None
    plain, x = copy.deepcopy(model), torch.randn(8, 3, 224, 224)
    br.razor_(model, br.RazorConfig(0.9))
    expected, wanted = gradients(plain, x)
    out, found = gradients(model, x)
    assert torch.equal(out, expected)
    assert runs
    assert torch.nn.functional.cosine_similarity(found[0].flatten(), wanted[0].flatten(), 0) > 0.95
    for mine, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("where", ["class", "instance"])
def test_a_patched_part_of_the_forward(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that looks at what the first convolution makes."""
    torch.manual_seed(0)
    model = ready(_vision())

    def impl(self: nn.Module, x: Tensor) -> Tensor:
        first = self.conv1(x)
        x = self.layer1(self.maxpool(self.relu(self.bn1(first))))
        x = self.layer4(self.layer3(self.layer2(x)))
        return self.fc(self.avgpool(x).flatten(1)) + first.mean()

    br.razor_(model, br.RazorConfig(0.9))
    if where == "class":
        monkeypatch.setattr(torchvision.models.ResNet, "_forward_impl", impl)
    else:
        model._forward_impl = functools.partial(impl, model)
    x = torch.randn(8, 3, 224, 224)
    out = model(x)
    br.unrazor_(model)
    assert torch.equal(out, model(x))


def test_weights_of_16_bits_run_on_all_samples(runs: list[int]) -> None:
    """Autograd would add up the chunks' gradients in 16 bits."""
    model = frozen(InvertedResidual(8, 8, exp_ratio=8.0), 8).bfloat16()
    br.razor_(model, br.RazorConfig(0.9))
    model(torch.randn(14, 3, 72, 72, dtype=torch.bfloat16))
    assert not runs


def test_weights_that_only_look_contiguous_run_on_all_samples(runs: list[int]) -> None:
    model = frozen(InvertedResidual(8, 8, exp_ratio=8.0), 8).to(memory_format=torch.channels_last)
    assert model[1].conv_dw.weight.is_contiguous()
    br.razor_(model, br.RazorConfig(0.9))
    model[1](torch.randn(7, 8, 72, 72, requires_grad=True))
    assert not runs


class _ToPadded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to_padded_tensor(0.0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_input_of_a_sequential() -> None:
    model = nn.Sequential(_ToPadded(), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    x = torch.nested.nested_tensor([torch.randn(3, 20, 20), torch.randn(3, 16, 20)])
    expected = model(x)
    br.razor_(model, br.RazorConfig(0.9))
    assert torch.equal(model(x), expected)
