"""Fifteen families of timm networks: converted, stepped once, and what stayed dense named in the report."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import backrazor as br
from backrazor.nn.base import DropIn

timm = pytest.importorskip("timm")

SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
# name: (timm's name, what makes it small, pixels, classes of modules that the report has to name as left)
FAMILIES: dict[str, tuple[str, dict, int, set[str]]] = {
    "vit": ("vit_tiny_patch16_224", SMALL_VIT | {"init_values": 0.1}, 32, set()),
    "deit": ("deit_tiny_distilled_patch16_224", SMALL_VIT, 32, set()),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)},
        64,
        {"DropPath"},
    ),
    "convnext": ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}, 64, {"ConvNeXtBlock"}),
    "mixer": ("mixer_s32_224", {"img_size": 64}, 64, set()),
    "beit": ("beit_base_patch16_224", SMALL_VIT, 32, {"Block"}),
    "eva": ("eva02_tiny_patch14_224", SMALL_VIT, 32, {"GluMlp"}),
    "mobilevit": ("mobilevit_xxs", {}, 64, set()),
    "efficientformer": (
        "efficientformer_l1",
        {"depths": (1, 1, 1, 2), "embed_dims": (8, 16, 24, 32)},
        224,
        {"Attention"},
    ),
    "resnet": ("resnet10t", {}, 64, set()),
    "regnet": ("regnetx_002", {}, 64, set()),
    "mobilenetv3": ("mobilenetv3_small_050", {}, 64, {"Hardsigmoid"}),
    "densenet": ("densenet121", {"block_config": (2, 2, 2, 2)}, 64, set()),
    "ghostnet": ("ghostnet_050", {}, 64, {"Hardsigmoid"}),
    "levit": ("levit_128s", {"depth": (1, 1, 1)}, 224, {"Attention", "AttentionDownsample"}),
}
KEEP_NEXT_TO_NOTHING = {"DropPath", "Softmax", "Flat", "RotaryEmbeddingCat", "FastAdaptiveAvgPool", "Downsample"}


def build(family: str) -> tuple[nn.Module, torch.Tensor]:
    name, small, side, _ = FAMILIES[family]
    model = timm.create_model(name, num_classes=5, **small).train()
    return model, torch.randn(2, 3, side, side)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_the_family_and_an_honest_report(family: str) -> None:
    plain, x = build(family)
    ours = copy.deepcopy(plain)
    report = br.razor_(ours, br.RazorConfig(0.9))
    sizes, losses = [], []
    for model in (plain, ours):
        torch.manual_seed(2)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        with br.memory.ledger(model) as book:
            loss = F.cross_entropy(model(x), torch.tensor([0, 1]))
        loss.backward()
        br.check_finite(model)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        sizes.append(book.total_bytes)
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)  # attention's formula beside the fused kernel
    assert sizes[1] < sizes[0]
    assert {row.type for row in report.left} <= FAMILIES[family][3] | KEEP_NEXT_TO_NOTHING
    assert FAMILIES[family][3] <= {row.type for row in report.left}
    assert_dense_bytes_are_named(ours, report, book)


def assert_dense_bytes_are_named(model: nn.Module, report: br.convert.Report, book: br.memory.Ledger) -> None:
    """A dense row is of the loss and the head's end, of a module that the report leaves, or a drop-in says why."""
    left, modules = {row.name for row in report.left}, dict(model.named_modules())
    for row in book.rows:
        if row.role != "dense" or not row.module or row.module in left:
            continue
        assert isinstance(modules[row.module], DropIn), f"{row.module} keeps {row.bytes} bytes and no line says so"
        assert not row.reason.startswith("saved by"), f"{row.module} is razored but keeps {row.bytes} bytes dense"


@pytest.mark.parametrize("family", ["vit", "swin", "convnext", "beit"])
def test_predicted_is_saved(family: str) -> None:
    model, x = build(family)
    br.razor_(model, br.RazorConfig(0.9))
    with br.memory.ledger(model) as book:
        loss = F.cross_entropy(model(x), torch.tensor([0, 0]))
    assert br.memory.predict(model, tuple(x.shape[1:]), 2).saved_bytes == book.total_bytes
    del loss


def test_windows_are_pruned_like_samples() -> None:
    """Swin's projections see windows at index 0, and keep the largest elements of each."""
    model, x = build("swin")
    report = br.razor_(model, br.RazorConfig(0.9))
    assert not any(row.type == "Linear" for row in report.left)
    assert sum(row.original == "WindowAttention" for row in report.replaced) == 4
    with br.memory.ledger(model) as book:
        out = model(x)
    for name in ("qkv", "proj"):
        kept = [row for row in book.rows if row.module.endswith(f"attn.{name}") and row.role == "pruned values"]
        assert len(kept) == 4
    del out
