"""Backbones, their weights, what a method trains, and checkpointing."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import timm
import torch
from conftest import compose_plain
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from razorlab.errors import UserError
from razorlab.models import build_backbone
from razorlab.models.build import find_stages
from razorlab.models.weights import load_weights
from razorlab.training.checkpointing import apply_checkpointing
from razorlab.training.methods import apply_method, set_train_mode

SMALL = {"name": "test_efficientnet", "pretrained": False, "weights": None, "drop_rate": 0.0, "head_init": "linear"}


def small(classes: int = 5):
    torch.manual_seed(0)
    return build_backbone(SMALL, classes, "pretrain")


def test_packaged_imagenet_weights_load_one_to_one_and_recognise_a_flower() -> None:
    sklearn_image = pytest.importorskip("sklearn.datasets").load_sample_image("flower.jpg")
    backbone = build_backbone(compose_plain()["model"], 1000, "pretrain")
    assert backbone.weights is not None and backbone.mean == backbone.std == (0.5, 0.5, 0.5)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    load_weights(model, backbone.weights, head="")
    image = torch.from_numpy(sklearn_image.copy()).permute(2, 0, 1)[None].float() / 255
    image = nn.functional.interpolate(image, size=(224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        top = model.eval()((image - 0.5) / 0.5).topk(5).indices[0].tolist()
    assert 985 in top, "ImageNet class 985 is daisy"
    for (name, ours), theirs in zip(backbone.model.state_dict().items(), model.state_dict().values(), strict=True):
        assert name.startswith("classifier.") or torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "test_efficientnet.r160_in1k"])
def test_a_network_is_built_for_the_size_of_its_images(name: str) -> None:
    backbone = build_backbone({**SMALL, "name": name}, 5, "pretrain", 64)
    assert backbone.one_size == name.startswith("test_vit")
    assert backbone.model(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_a_size_that_a_network_cannot_be_built_for_is_named_with_its_own() -> None:
    with pytest.raises(UserError, match=r"images of 100 px: .*; it is made for 224 px, set data\.image_size=224"):
        build_backbone({**SMALL, "name": "twins_pcpvt_small"}, 5, "pretrain", 100)


@pytest.mark.parametrize("how", ["linear", "uniform", "zero"])
def test_the_head_starts_as_asked(how: str) -> None:
    torch.manual_seed(0)
    model = build_backbone({**SMALL, "head_init": how}, 50, "pretrain").model
    weight, bound = model.classifier.weight.detach(), model.classifier.in_features**-0.5
    if how == "zero":
        assert not weight.any()
    else:
        assert 0.9 * bound < weight.abs().max() <= bound * 1.0001 and float(weight.std()) == pytest.approx(
            bound / 3**0.5, rel=0.05
        )
    assert bool(model.classifier.bias.any()) == (how == "linear")


@pytest.mark.parametrize("section", ["model=vit_b16", "experiment=table2/digits_paper90"])
def test_the_paper_s_transformer_drops_after_the_position_and_twice_in_each_mlp_only(section: str) -> None:
    config = {**compose_plain(section)["model"], "name": "test_vit", "pretrained": False}
    model = build_backbone(config, 5, "pretrain").model
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    dropping = {name for name, rate in rates.items() if rate}
    assert dropping == {"pos_drop"} | {f"blocks.{i}.mlp.drop{n}" for i in range(len(model.blocks)) for n in (1, 2)}
    assert {rates[name] for name in dropping} == {0.1} and rates["head_drop"] == 0


@pytest.mark.parametrize("name", ["test_efficientnet", "proxylessnas"])
@pytest.mark.parametrize("key", ["pos_drop_rate", "mlp_drop_rate"])
def test_a_network_without_an_mlp_has_no_dropout_in_one(name: str, key: str) -> None:
    with pytest.raises(UserError, match=rf"model\.name={name} cannot be built .*model\.{key}=0\.2"):
        build_backbone({**SMALL, "name": name, key: 0.2}, 5, "pretrain")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), file)
    with pytest.raises(UserError, match=r"weights\.pth does not fit"):
        load_weights(small().model, file, "classifier")
    state = small(classes=7).model.state_dict()
    torch.save({"state_dict": state}, file)
    backbone = small()
    load_weights(backbone.model, file, backbone.head)
    assert torch.equal(backbone.model.conv_stem.weight, state["conv_stem.weight"])
    state["conv_stem.weight"] = torch.zeros(1)
    torch.save(state, file)
    with pytest.raises(UserError, match=r"conv_stem\.weight is \(1,\)"):
        load_weights(backbone.model, file, backbone.head)


@pytest.mark.parametrize(
    ("method", "affine", "trained"),
    [
        ("full", "train", lambda name, norm: True),
        ("full", "frozen", lambda name, norm: not norm),
        ("last", "frozen", lambda name, norm: False),
        ("norm_last", "train", lambda name, norm: norm),
        ("bias", "train", lambda name, norm: name.endswith(".bias")),
        ("bias", "frozen", lambda name, norm: name.endswith(".bias") and not norm),
    ],
)
@pytest.mark.parametrize("stats", ["batch", "frozen"])
def test_a_method_trains_what_it_says(method: str, affine: str, stats: str, trained) -> None:
    backbone = small()
    norms = {name for name, module in backbone.model.named_modules() if isinstance(module, _BatchNorm)}
    frozen = apply_method(backbone.model, backbone.head, {"name": method, "bn_affine": affine, "bn_stats": stats})
    for name, parameter in backbone.model.named_parameters():
        in_norm = name.rpartition(".")[0] in norms
        expected = name.startswith(f"{backbone.head}.") or trained(name, in_norm)
        assert parameter.requires_grad == expected, name
    set_train_mode(backbone.model, frozen)
    assert backbone.model.training
    assert all(backbone.model.get_submodule(name).training == (stats == "batch") for name in norms)


@pytest.mark.parametrize("granularity", ["block", "stage", "selective"])
@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_vit", "test_convnext"])
def test_checkpointing_gives_the_same_step_and_holds_less(name: str, granularity: str) -> None:
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=5, drop_rate=0.3)
    recomputed = copy.deepcopy(plain)
    names = apply_checkpointing(recomputed, find_stages(recomputed), granularity)
    assert names and list(recomputed.state_dict()) == list(plain.state_dict())
    size = plain.default_cfg["input_size"][-1]
    x = torch.randn(2, 3, size, size)
    held = []
    for model in (plain, recomputed):
        torch.manual_seed(1)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            loss = model(x).square().mean()
        loss.backward()
        held.append(sum(sizes))
    assert held[1] < held[0]
    for (key, expected), (_, got) in zip(plain.named_parameters(), recomputed.named_parameters(), strict=True):
        assert torch.equal(expected.grad, got.grad), key
    for (key, expected), (_, got) in zip(plain.named_buffers(), recomputed.named_buffers(), strict=True):
        assert torch.equal(expected, got), f"{key}: recomputation must not update running statistics again"
    pickle.loads(pickle.dumps(recomputed))(x)


def test_checkpointing_an_unknown_layout_is_refused() -> None:
    with pytest.raises(UserError, match=r"trainer\.checkpointing=block"):
        apply_checkpointing(nn.Sequential(nn.Linear(2, 2)), {}, "block")
