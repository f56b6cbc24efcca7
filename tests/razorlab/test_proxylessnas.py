"""ProxylessNAS-Mobile against its published architecture, block by block, and its checkpoint's way in."""

import pytest
import torch

from razorlab.models.proxylessnas import proxylessnas

# One entry per block: output channels, kernel, expansion, stride, shortcut; a kernel of None is an identity block.
BLOCKS = [
    (16, 3, 1, 1, False),
    (32, 5, 3, 2, False), (32, 3, 3, 1, True), (32, None, None, 1, True), (32, None, None, 1, True),
    (40, 7, 3, 2, False), (40, 3, 3, 1, True), (40, 5, 3, 1, True), (40, 5, 3, 1, True),
    (80, 7, 6, 2, False), (80, 5, 3, 1, True), (80, 5, 3, 1, True), (80, 5, 3, 1, True),
    (96, 5, 6, 1, False), (96, 5, 3, 1, True), (96, 5, 3, 1, True), (96, 5, 3, 1, True),
    (192, 7, 6, 2, False), (192, 7, 6, 1, True), (192, 7, 3, 1, True), (192, 7, 3, 1, True),
    (320, 7, 6, 1, False),
]  # fmt: skip


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return proxylessnas(100)


def describe(block, channels):
    """A row as in BLOCKS, read off the built layers of a block that is fed `channels`."""
    shortcut = block.shortcut is not None
    if not list(block.conv.parameters()):
        return channels, None, None, 1, shortcut
    depth_conv, point_conv = block.conv.depth_conv.conv, block.conv.point_linear.conv
    assert depth_conv.groups == depth_conv.in_channels == point_conv.in_channels
    assert depth_conv.padding == (depth_conv.kernel_size[0] // 2,) * 2
    expansion = depth_conv.in_channels // channels
    assert (block.conv.inverted_bottleneck is None) == (expansion == 1)
    return point_conv.out_channels, depth_conv.kernel_size[0], expansion, depth_conv.stride[0], shortcut


def test_every_block(network):
    channels, got = network.first_conv.conv.out_channels, []
    for block in network.blocks:
        got.append(describe(block, channels))
        channels = got[-1][0]
    assert got == BLOCKS


def test_ends_and_constants(network):
    stem, last = network.first_conv.conv, network.feature_mix_layer.conv
    assert (stem.in_channels, stem.out_channels, stem.kernel_size, stem.stride) == (3, 32, (3, 3), (2, 2))
    assert (last.in_channels, last.out_channels, last.kernel_size) == (320, 1280, (1, 1))
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-3}
    assert len([m for m in network.modules() if isinstance(m, torch.nn.ReLU6)]) == 41
    assert not any(isinstance(m, torch.nn.ReLU) for m in network.modules())
    assert [m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)] == [0.2]
    assert sum(p.numel() for p in network.parameters()) == 2_927_612


def test_logits_and_a_gradient_for_every_parameter(network):
    network.train()
    logits = network(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 100)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def published_layout(network):
    """A checkpoint as published: older name for the branch, 1000 classes, wrapped under one key."""
    return {"state_dict": {k.replace(".conv.", ".mobile_inverted_conv.", 1) if k.startswith("blocks.") else k: v
                           for k, v in network.state_dict().items()}}  # fmt: skip


def test_checkpoint_body_loads_and_another_head_is_new(tmp_path):
    source = proxylessnas(1000)
    path = tmp_path / "proxyless_mobile.pth"
    torch.save(published_layout(source), path)
    loaded, small = proxylessnas(1000, path).state_dict(), proxylessnas(7, path).state_dict()
    for name, tensor in source.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
        if not name.startswith("classifier."):
            assert torch.equal(small[name], tensor), name
    assert small["classifier.linear.weight"].shape == (7, 1280)


@pytest.mark.parametrize("damage", ["no key", "missing tensor", "extra tensor", "other shape"])
def test_wrong_checkpoint_is_refused_in_one_line(tmp_path, damage):
    checkpoint = published_layout(proxylessnas(10))
    state = checkpoint["state_dict"]
    name = "first_conv.conv.weight"
    if damage == "no key":
        checkpoint = state
    elif damage == "missing tensor":
        del state[name]
    elif damage == "extra tensor":
        state["blocks.30.conv.weight"] = torch.zeros(1)
    else:
        state[name] = state[name][:, :1]
    path = tmp_path / "wrong.pth"
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"wrong.pth(: not ProxylessNAS-Mobile| has no key 'state_dict')") as error:
        proxylessnas(10, path)
    assert "\n" not in str(error.value)


def test_missing_file_and_wrong_classes():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: no such file"):
        proxylessnas(10, "nowhere.pth")
    with pytest.raises(ValueError, match="num_classes=0"):
        proxylessnas(0)
