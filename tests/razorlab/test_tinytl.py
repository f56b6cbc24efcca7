"""TinyTL's lite residual modules, and frozen weights stored at 8 bits."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from ofa.utils import replace_bn_with_gn, replace_conv2d_with_my_conv2d
from timm.layers import Conv2dSame, StdConv2d
from torch import nn

import backrazor as br
from razorlab.errors import UserError
from razorlab.models import build_backbone
from razorlab.models.frozen_storage import (
    CODEBOOK,
    CodedConv2d,
    CodedLinear,
    coded_weights,
    kmeans_codebook,
    store_frozen_at_8_bits,
)
from razorlab.models.proxylessnas import proxylessnas
from razorlab.models.standardised import StandardisedConv2d
from razorlab.models.tinytl import LiteResidual, insert_lite_residuals, tinytl_network
from razorlab.models.zoo import BACKBONES
from razorlab.training.methods import apply_method, set_train_mode


def bytes_of(model: nn.Module) -> int:
    tensors = (*model.parameters(), *model.buffers())
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_every_block_with_a_path_gets_a_branch_that_starts_silent() -> None:
    torch.manual_seed(0)
    plain = proxylessnas(10).eval()
    lite = copy.deepcopy(plain)
    names = insert_lite_residuals(lite)
    assert len(names) == 20, "two of the 22 blocks are identities"
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(plain(x), lite.eval()(x))
    branch = lite.get_submodule(names[1]).lite
    kinds = [type(layer) for layer in branch][1:]
    assert kinds == [StdConv2d, nn.GroupNorm, nn.ReLU, StdConv2d, nn.GroupNorm]
    wide, narrow = branch[1], branch[4]
    assert wide.kernel_size == (5, 5) and wide.groups == 2 and wide.in_channels == wide.out_channels
    assert narrow.kernel_size == (1, 1)
    norm = branch[2]
    assert norm.num_channels // norm.num_groups == 8


def test_tinytl_trains_the_branches_and_the_head_alone_and_the_branches_learn() -> None:
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=5)
    insert_lite_residuals(model)
    apply_method(model, "classifier", {"name": "tinytl_l", "bn_affine": "train", "bn_stats": "frozen"})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lite." in name or name.startswith("classifier.") for name in trained)
    branch = next(module for module in model.modules() if isinstance(module, LiteResidual)).lite
    model.eval()(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert branch[-1].weight.grad.abs().sum() > 0, "the zero norm itself has a gradient"
    nn.init.ones_(branch[-1].weight)
    model.zero_grad()
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert branch[1].weight.grad.abs().sum() > 0


class ReleasedBranch(nn.Module):
    """A branch beside a path, with the names of TinyTL's released file, in plain layers."""

    def __init__(self, path: nn.Module, kernel_size: int) -> None:
        super().__init__()
        self.main_branch = path
        inner = path.in_channels
        self.lite_residual = nn.Sequential()
        wide = nn.Conv2d(inner, inner, kernel_size, path.stride, kernel_size // 2, groups=2, bias=False)
        parts = {"pooling": nn.AvgPool2d(2), "conv1": wide, "bn1": nn.BatchNorm2d(inner, eps=1e-3), "act": nn.ReLU()}
        parts["conv2"] = nn.Conv2d(inner, path.out_channels, 1, bias=False)
        parts["final_bn"] = nn.BatchNorm2d(path.out_channels, eps=1e-3)
        for name, part in parts.items():
            self.lite_residual.add_module(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.main_branch(x)
        return y + nn.functional.interpolate(self.lite_residual(x), y.shape[2:], mode="bilinear")


def released_tinytl() -> nn.Module:
    """The released network from once-for-all's own parts: kernels fit the maps that images of 128 px would make."""
    network = proxylessnas(5)
    resolution = 128
    for block in list(network.blocks)[1:]:
        if not hasattr(block.conv, "stride"):
            continue  # reduced to its shortcut
        kernel_size = 5 if resolution // 2 >= 5 else 3
        resolution //= block.conv.stride
        block.conv = ReleasedBranch(block.conv, kernel_size)
    replace_bn_with_gn(network, gn_channel_per_group=8)
    replace_conv2d_with_my_conv2d(network, ws_eps=1e-5)
    for name, parameter in network.named_parameters():
        nn.init.normal_(parameter, 1.0 if "bn" in name else 0.0, 0.3)
    return network


def test_the_released_network_is_built_and_read_as_its_authors_do(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = released_tinytl().eval()
    file = tmp_path / "released"
    torch.save({"state_dict": theirs.state_dict()}, file)
    section = {"name": "tinytl", "pretrained": True, "weights": str(file), "drop_rate": 0.2, "head_init": "zero"}
    backbone = build_backbone(section, 5, tmp_path)
    ours, head = backbone.model.eval(), theirs.classifier
    branches = [module for module in ours.modules() if isinstance(module, LiteResidual)]
    assert [branch.lite[1].kernel_size[0] for branch in branches] == [5] * 15 + [3] * 4
    ours.classifier.load_state_dict(head.state_dict())
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
    assert insert_lite_residuals(ours) and sum(isinstance(m, LiteResidual) for m in ours.modules()) == 19
    state = theirs.state_dict()
    state.popitem()
    state.pop("first_conv.conv.weight")
    torch.save({"state_dict": state}, file)
    with pytest.raises(UserError, match=r"cannot be read as weights of this network .*first_conv\.conv\.weight"):
        build_backbone(section, 5, tmp_path)
    with pytest.raises(UserError, match=r"pretrain/fetch\.py tinytl"):
        build_backbone({**section, "weights": None}, 5, tmp_path)


def _renamed(state: dict) -> dict:
    return {name.replace("lite_residual", "lite"): tensor for name, tensor in state.items()}


WRONG_FILES = {
    "another layout": (lambda state: state, "has no key 'state_dict' with named tensors"),
    "no tensors": (lambda state: {"state_dict": {"first_conv.conv.weight": 1.0}}, "with named tensors"),
    "numbers for names": (lambda state: {"state_dict": dict(enumerate(state.values()))}, "with named tensors"),
    "no dict": (lambda state: {"state_dict": [*state.values()]}, "with named tensors"),
    "one lacks": (lambda state: {"state_dict": dict([*state.items()][1:])}, "1 tensors differ, first first_conv"),
    "one too many": (lambda state: {"state_dict": state | {"extra": torch.ones(1)}}, "1 tensors differ, first extra"),
    "other names": (lambda state: {"state_dict": _renamed(state)}, "tensors differ, first blocks.1.conv.lite"),
    "another shape": (
        lambda state: {"state_dict": state | {"first_conv.conv.weight": torch.ones(8, 3, 3, 3)}},
        "1 tensors differ, first first_conv.conv.weight",
    ),
}


def test_the_released_file_is_found_by_its_name_and_a_wrong_one_ends_in_one_line(command, tmp_path: Path) -> None:
    """Through the command line; the file has the published layout and lies where pretrain/fetch.py puts it."""
    torch.manual_seed(0)
    state = released_tinytl().state_dict()
    file = tmp_path / "pretrain" / BACKBONES["tinytl"]().weights_file
    file.parent.mkdir()
    settings = ("model=tinytl", "data=digits", "data.train_fraction=0.02", "data.image_size=32", "trainer.steps=1")
    settings += ("trainer.batch_size=2", "trainer.measure.mode=none", "trainer.progress=false", "trainer.device=cpu")
    torch.save({"state_dict": state}, file)
    code, lines = command(*settings, "trainer.eval_batch_size=256")
    assert code == 0, lines
    assert any("TinyTL" in line or str(file.name) in line for line in lines), lines
    for name, (change, words) in WRONG_FILES.items():
        torch.save(change(state), file)
        code, lines = command(*settings, "seed=1")
        assert code == 2 and len(lines) == 1 and words in lines[0] and file.name in lines[0], (name, lines)


def test_tinytl_with_biases_leaves_the_last_shift_of_a_branch() -> None:
    model = tinytl_network(5)
    apply_method(model, "classifier", {"name": "tinytl_lb", "bn_affine": "train", "bn_stats": "frozen"})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    branch = next(name for name, module in model.named_modules() if isinstance(module, LiteResidual))
    assert f"{branch}.lite.5.weight" in trained and f"{branch}.lite.2.bias" in trained
    assert f"{branch}.lite.5.bias" not in trained and "first_conv.bn.bias" in trained
    assert "first_conv.conv.weight" not in trained and "first_conv.bn.weight" not in trained


def test_a_network_without_such_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="no inverted residual blocks"):
        insert_lite_residuals(timm.create_model("test_resnet"))


def test_frozen_weights_take_a_byte_each_and_compute_what_their_codes_say() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=2), nn.Flatten(), nn.Linear(32 * 36, 8)
    )
    for parameter in model[2].parameters():
        parameter.requires_grad_(False)
    model[4].weight.requires_grad_(False)
    before = bytes_of(model)
    assert store_frozen_at_8_bits(model) == ("2", "4")
    assert isinstance(model[2], CodedConv2d) and isinstance(model[4], CodedLinear) and type(model[0]) is nn.Conv2d
    frozen = coded_weights(model)
    assert frozen == 32 * 16 * 9 + 8 * 32 * 36
    assert bytes_of(model) == before - 3 * frozen + 2 * CODEBOOK * 4

    decoded = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=2), nn.Flatten(), nn.Linear(32 * 36, 8)
    )
    for ours, theirs in zip(model, decoded, strict=True):
        for name in ("weight", "bias"):
            if hasattr(theirs, name):
                getattr(theirs, name).data.copy_(getattr(ours, name))
    x = torch.randn(4, 3, 8, 8)
    for network in (model, decoded):
        network(x).square().sum().backward()
    assert torch.equal(model(x), decoded(x))
    assert torch.allclose(model[0].weight.grad, decoded[0].weight.grad, rtol=1e-4, atol=1e-3)
    assert torch.allclose(model[4].bias.grad, decoded[4].bias.grad, rtol=1e-5)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "vit_b16" else name for name in BACKBONES]
)
def test_every_backbone_s_frozen_weights_take_a_quarter(name: str) -> None:
    """Under the razor, too: the head learns, and what is kept for backward is what the codes leave."""
    torch.manual_seed(0)
    section = {"name": name, "pretrained": False, "weights": None, "drop_rate": 0.0, "head_init": "linear"}
    size = 224 if name == "vit_b16" else 64
    backbone = build_backbone(section, 10, "nowhere", size)
    model = backbone.model
    norms = apply_method(model, backbone.head, {"name": "norm_last", "bn_affine": "train", "bn_stats": "frozen"})
    set_train_mode(model, norms)
    before, frozen = bytes_of(model), sum(p.numel() for p in model.parameters() if not p.requires_grad)
    images = torch.randn(2, 3, size, size)
    plain = model(images).detach()
    store_frozen_at_8_bits(model)
    assert coded_weights(model) > 0.99 * frozen
    assert bytes_of(model) < 0.3 * before
    assert torch.nn.functional.cosine_similarity(plain.flatten(), model(images).detach().flatten(), dim=0) > 0.98
    br.razor_(model, br.RazorConfig(0.9))
    with br.memory.ledger(model) as ledger:
        loss = model(images).square().mean()
    largest = max(module.weight_codes.numel() for module in model.modules() if hasattr(module, "weight_codes"))
    assert largest not in {row.bytes // 4 for row in ledger.rows if row.role == "dense"}, "a decoded weight is kept"
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 16, 3, padding="same", dilation=2),
        nn.Conv2d(16, 16, 4, padding="same"),
        nn.Conv2d(16, 16, 3, padding="valid", stride=2),
        nn.Conv2d(16, 16, 3, padding=(1, 2), padding_mode="circular"),
        StandardisedConv2d(16, 16, 3, stride=2, padding=1, bias=False),
        Conv2dSame(16, 16, 3, stride=2),
        Conv2dSame(16, 16, 5, stride=2, groups=4),
    ],
    ids=str,
)
def test_a_coded_convolution_pads_as_its_class_does(layer: nn.Module) -> None:
    """Its output and its input's gradient are those of the layer with the decoded weight, to the bit."""
    plain, coded = copy.deepcopy(layer), nn.Sequential(copy.deepcopy(layer)).requires_grad_(False)
    assert store_frozen_at_8_bits(coded) == ("0",)
    plain.weight.data.copy_(coded[0].weight)
    results = []
    for network in (plain, coded):
        torch.manual_seed(0)
        x = torch.randn(2, 16, 9, 11, requires_grad=True)
        y = network(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_codebook_is_close_and_always_the_same() -> None:
    weights = np.random.default_rng(0).standard_normal(50_000).astype(np.float32)
    centres = kmeans_codebook(weights)
    assert len(centres) == CODEBOOK and (np.diff(centres) > 0).all()
    assert np.array_equal(centres, kmeans_codebook(weights[::-1].copy()))
    nearest = centres[np.searchsorted((centres[1:] + centres[:-1]) / 2, weights)]
    uniform = np.linspace(weights.min(), weights.max(), CODEBOOK)
    rounded = uniform[np.abs(weights[:, None] - uniform).argmin(1)]
    assert np.square(weights - nearest).mean() < 0.8 * np.square(weights - rounded).mean()
    few = np.array([0.0, 1.0, 1.0, -2.0], dtype=np.float32)
    assert kmeans_codebook(few).tolist() == [-2.0, 0.0, 1.0]
