"""The released code's formula, against the figures that its own profiler prints and against small sums by hand."""

import pytest
import timm
import torch
import torchvision
from torch import nn

import backrazor as br
from razorlab.models.proxylessnas import proxylessnas
from razorlab.official import official_formula, official_memory

CLASSES = 100
INPUT = (3, 224, 224)
MB, MIB = 1e6, 2**20


def mobilenet_v2() -> nn.Module:
    model = torchvision.models.mobilenet_v2()
    model.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, CLASSES))
    return model


def resnet18() -> nn.Module:
    model = torchvision.models.resnet18()
    model.fc = nn.Sequential(nn.Dropout(0.2), nn.Linear(512, CLASSES))
    return model


def freeze_batch_norm(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    return model


# What the released profiler prints at batch 8, 224 px, in MB: all trained, then batch norm frozen at each sparsity.
CNN_FIGURES = [
    (lambda: proxylessnas(CLASSES), 367.0, {None: 194.0, 0.8: 59.3, 0.9: 42.1, 0.97: 40.0}),
    (mobilenet_v2, 447.7, {None: 233.9, 0.9: 59.1}),
    (resnet18, 198.1, {0.9: 75.4}),
]


@pytest.mark.parametrize(("build", "full", "frozen"), CNN_FIGURES, ids=["proxylessnas", "mobilenet_v2", "resnet18"])
def test_cnn_figures_to_the_printed_digit(build, full, frozen):
    model = build()
    assert round(official_formula(model, INPUT, 8).total_bytes / MB, 1) == full
    freeze_batch_norm(model)
    got = {s: round(official_formula(model, INPUT, 8, s).total_bytes / MB, 1) for s in frozen}
    assert got == frozen


def test_vit_figures_to_the_printed_digit():
    model = timm.create_model("vit_base_patch16_224", num_classes=CLASSES)
    figures = {None: 19234.6, 0.8: 4743.0, 0.9: 3912.1, 0.97: 3330.5}
    got = {s: round(official_formula(model, INPUT, 128, s).total_bytes / MIB, 1) for s in figures}
    assert got == figures


def small_cnn() -> nn.Module:
    """(4, 6, 6) in: grouped conv, frozen-able norm, ReLU, head."""
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)
    )


def test_small_cnn_by_hand():
    got = official_formula(small_cnn(), (4, 6, 6), 5, sparsity=0.5, head_sparsity=0.75)
    kept = [144 * (2 + 1 / 8), 288 * 4, 288 / 8, 288 * (1 + 1 / 8)]
    assert [row.bytes for row in got.rows] == pytest.approx([5 * k for k in kept])
    assert [row.module for row in got.rows] == ["0", "1", "2", "4"]
    # A layer's own row is kept after its temporaries are counted.
    at_head = sum(kept[:3]) + 4 * (288 + 3)
    at_relu = sum(kept[:2]) + 4 * 288
    assert got.peak_activation_bytes == pytest.approx(5 * max(at_head, at_relu))
    assert got.peak_module == "4"
    assert got.parameter_bytes == 4 * sum(p.numel() for p in small_cnn().parameters())
    assert got.total_bytes == got.peak_activation_bytes + got.parameter_bytes


def test_frozen_layers_keep_no_input_and_cost_a_byte_a_parameter():
    model = small_cnn()
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    got = official_formula(model, (4, 6, 6), 1)
    # Only the head trains, so not even the ReLU's bits are counted.
    assert [row.module for row in got.rows] == ["4"]
    frozen = sum(p.numel() for layer in (model[0], model[1]) for p in layer.parameters())
    assert got.parameter_bytes == frozen + 4 * (288 * 3 + 3)
    model[0].bias.requires_grad_(True)
    assert [row.module for row in official_formula(model, (4, 6, 6), 1).rows] == ["2", "4"]


class ResidualBlock(nn.Module):
    """Stands for once-for-all's class of this name, which the formula recognises by name and `shortcut`."""

    def __init__(self, shortcut: nn.Module | None):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.shortcut = shortcut

    def forward(self, x):
        return self.conv(x) if self.shortcut is None else self.conv(x) + self.shortcut(x)


def test_residual_input_is_held_inside_the_block_only():
    def peak(shortcut):
        return official_formula(nn.Sequential(ResidualBlock(shortcut)), (2, 5, 5), 1).peak_activation_bytes

    assert peak(nn.Identity()) - peak(None) == 4 * 2 * 5 * 5


def test_transformer_rows_of_one_block():
    model = timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=12, depth=1, num_heads=3, mlp_ratio=2, num_classes=2
    )
    n, d, h, s = 5, 12, 3, 0.75
    got = official_formula(model, (3, 8, 8), 2, sparsity=s)
    survivors = {size: size - int(size * s) + 1 for size in (n * d, 2 * n * d)}
    linear = 2 * survivors[n * d] + n * d / 8
    operand = 2 * (1 - s) + 1 / 8
    want = {
        ("patch_embed.proj", "input"): 4 * 3 * 64,
        ("blocks.0.norm1", "norm input"): 4 * survivors[n * d] + n * d / 8,
        ("blocks.0.attn", "scores"): h * n * n * operand,
        ("blocks.0.attn", "q, k, v"): 3 * n * d * operand,
        ("blocks.0.attn.qkv", "input of q"): linear,
        ("blocks.0.attn.qkv", "input of k"): linear,
        ("blocks.0.attn.qkv", "input of v"): linear,
        ("blocks.0.attn.proj", "input"): linear,
        ("blocks.0.norm2", "norm input"): 4 * survivors[n * d] + n * d / 8,
        ("blocks.0.mlp", "GELU input"): 2 * 2 * n * d,
        ("blocks.0.mlp.fc1", "input"): linear,
        ("blocks.0.mlp.fc2", "input"): 2 * survivors[2 * n * d] + 2 * n * d / 8,
        ("norm", "norm input"): 4 * n * d,
        ("head", "input"): 4 * d,
    }
    assert {(row.module, row.role): row.bytes for row in got.rows} == {k: pytest.approx(2 * v) for k, v in want.items()}


def test_model_is_left_as_it_was():
    model = small_cnn().train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    official_formula(model, (4, 6, 6), 2, 0.9)
    assert [m.training for m in model] == [True, False, True, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_allocates_no_activation():
    """A forward of one such sample would take 50 GB per layer."""
    model = nn.Sequential(nn.Conv2d(1, 128, 1), nn.ReLU())
    got = official_formula(model, (1, 10_000, 10_000), 1)
    assert got.total_bytes > 5e10


def test_timm_batch_norm_with_its_activation_inside():
    """timm's BatchNormAct2d is a batch norm that owns a ReLU6: norm first, then the activation."""
    model = timm.create_model("tf_efficientnet_lite0", num_classes=CLASSES)
    rows = official_formula(model, INPUT, 1, 0.9).rows
    assert [(row.module, row.role) for row in rows[:3]] == [
        ("conv_stem", "input"), ("bn1", "norm input"), ("bn1.act", "activation"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto", "efficientnet_b0", "mixer_b16_224"])
def test_networks_the_formula_never_covered_are_refused(name):
    model = timm.create_model(name, num_classes=2)
    with pytest.raises(ValueError, match="official formula"):
        official_formula(model, INPUT, 1, 0.9)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "arguments",
    [
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"sparsity": 0.9, "head_sparsity": 1.5},
        {"head_sparsity": 0.5},
        {"batch_size": 0},
    ],
    ids=str,
)
def test_wrong_arguments_name_key_and_value(arguments):
    key = list(arguments)[-1]
    with pytest.raises(ValueError, match=f"{key}={arguments[key]}"):
        official_formula(small_cnn(), (4, 6, 6), **{"batch_size": 1, **arguments})


def test_a_razored_network_is_asked_at_its_own_sparsities_and_stays_razored():
    model = timm.create_model("tf_efficientnet_lite0", num_classes=5)
    plain = official_formula(model, (3, 64, 64), 2, sparsity=0.9, head_sparsity=0.5)
    dense = official_formula(model, (3, 64, 64), 2)
    assert official_memory(model, (3, 64, 64), 2) == dense
    br.razor_(model, br.RazorConfig.paper(0.9, head_sparsity=0.5))
    classes = [type(module) for module in model.modules()]
    assert official_memory(model, (3, 64, 64), 2) == plain
    assert [type(module) for module in model.modules()] == classes and plain.total_bytes < dense.total_bytes
