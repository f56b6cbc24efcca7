"""Every refusal that a dense layer makes, the razored one makes with the same type of exception: a table of bad calls
over all drop-ins. Where the dense layer accepts a strange call, the razored one gives the same output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backrazor as br
from backrazor.nn import DROP_INS, qualified_name
from tests.backrazor.compare import assert_close, assert_same_bits

timm = pytest.importorskip("timm")


def _timm(path: str, *arguments: Any, **settings: Any) -> Callable[[], nn.Module]:
    module, name = path.rsplit(".", 1)
    return lambda: getattr(pytest.importorskip(f"timm.{module}"), name)(*arguments, **settings)


def _transformers(name: str, *arguments: int, module: str = "activations") -> Callable[[], nn.Module]:
    return lambda: getattr(pytest.importorskip(f"transformers.{module}"), name)(*arguments)


# A layer of each class, and a call that is right for it. Blocks and attention of the libraries have tests of their own.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "NonDynamicallyQuantizableLinear": (lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(6, 4), (3, 6)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 8, 8)),
    "Conv2d reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 8, 8)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (4, 3, 5)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (4, 3, 5, 5)),
    "BatchNorm2d evaluated": (lambda: nn.BatchNorm2d(3).eval(), (4, 3, 5, 5)),
    "BatchNorm2d without statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 5, 5)),
    "LayerNorm": (lambda: nn.LayerNorm(6), (3, 5, 6)),
    "RMSNorm": (lambda: nn.RMSNorm(6), (3, 5, 6)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), (3, 6, 5)),
    "ReLU": (nn.ReLU, (3, 6)),
    "ReLU6": (nn.ReLU6, (3, 6)),
    "ReLU in place": (lambda: nn.ReLU(inplace=True), (3, 6)),
    "Hardtanh": (nn.Hardtanh, (3, 6)),
    "Hardswish": (nn.Hardswish, (3, 6)),
    "SiLU": (nn.SiLU, (3, 6)),
    "GELU": (nn.GELU, (3, 6)),
    "Dropout": (lambda: nn.Dropout(0.5), (3, 6)),
    "MaxPool2d": (lambda: nn.MaxPool2d(2), (2, 3, 6, 6)),
    "MaxPool3d": (lambda: nn.MaxPool3d(2), (2, 3, 4, 6, 6)),
    "AvgPool2d": (lambda: nn.AvgPool2d(2), (2, 3, 6, 6)),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(2), (2, 3, 6, 6)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (2, 5, 8)),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), (2, 5, 8)),
    "timm Linear": (_timm("layers.linear.Linear", 6, 4), (3, 6)),
    "timm Conv2dSame": (_timm("layers.conv2d_same.Conv2dSame", 3, 4, 3, stride=2), (2, 3, 9, 8)),
    "timm BatchNormAct2d": (_timm("layers.norm_act.BatchNormAct2d", 3), (4, 3, 5, 5)),
    "timm LayerNorm": (_timm("layers.norm.LayerNorm", 6), (3, 5, 6)),
    "timm LayerNorm2d": (_timm("layers.norm.LayerNorm2d", 6), (3, 6, 5, 5)),
    "timm GroupNorm": (_timm("layers.norm.GroupNorm", 6, 2), (3, 6, 5, 5)),
    "timm GroupNorm1": (_timm("layers.norm.GroupNorm1", 6), (3, 6, 5, 5)),
    "timm GELU": (_timm("layers.activations.GELU"), (3, 6)),
    "timm GELUTanh": (_timm("layers.activations.GELUTanh"), (3, 6)),
    "timm QuickGELU": (_timm("layers.activations.QuickGELU"), (3, 6)),
    "timm LayerScale": (_timm("layers.layer_scale.LayerScale", 6), (2, 5, 6)),
    "timm LayerScale2d": (_timm("layers.layer_scale.LayerScale2d", 6), (2, 6, 5, 5)),
    "timm SEModule": (_timm("layers.squeeze_excite.SEModule", 16), (2, 16, 5, 5)),
    "timm SqueezeExcite": (_timm("models._efficientnet_blocks.SqueezeExcite", 16), (2, 16, 5, 5)),
    "timm Attention": (_timm("layers.attention.Attention", 8, num_heads=2), (2, 5, 8)),
    "transformers GELU": (_transformers("GELUActivation"), (3, 6)),
    "transformers QuickGELU": (_transformers("QuickGELUActivation"), (3, 6)),
    "transformers NewGELU": (_transformers("NewGELUActivation"), (3, 6)),
    "transformers FastGELU": (_transformers("FastGELUActivation"), (3, 6)),
    "transformers AccurateGELU": (_transformers("AccurateGELUActivation"), (3, 6)),
    "transformers GELUTanh": (_transformers("GELUTanh"), (3, 6)),
    "transformers BloomGelu": (_transformers("BloomGelu", module="models.bloom.modeling_bloom"), (3, 6)),
    "transformers Conv1D": (_transformers("Conv1D", 4, 6, module="pytorch_utils"), (3, 6)),
    "transformers SiLU": (_transformers("SiLUActivation"), (3, 6)),
}

ELSEWHERE = {  # drop-ins whose calls are tested with the networks that hold them
    "timm.layers.attention.AttentionRope",
    "timm.models.eva.EvaAttention",
    "timm.models.beit.Attention",
    "timm.models.swin_transformer.WindowAttention",
    "transformers.models.bert.modeling_bert.BertSelfAttention",
    "transformers.models.bert.modeling_bert.BertCrossAttention",
    "transformers.models.vit.modeling_vit.ViTAttention",
}


def _resized(axis: int, size: int) -> Callable[[tuple[int, ...]], Tensor]:
    def build(shape: tuple[int, ...]) -> Tensor:
        sizes = list(shape)
        sizes[axis] = size
        return torch.randn(sizes)

    return build


CALLS: dict[str, Callable[[tuple[int, ...]], object]] = {
    "right": lambda shape: torch.randn(shape),
    "one sample": _resized(0, 1),
    "no samples": _resized(0, 0),
    "no channels": _resized(1, 0),
    "a channel too many": lambda shape: _resized(1, shape[1] + 1)(shape),
    "an element too many": lambda shape: _resized(-1, shape[-1] + 1)(shape),
    "a last axis of one": _resized(-1, 1),
    "no elements at the end": _resized(-1, 0),
    "one value per channel": lambda shape: torch.randn(1, shape[1], *(1 for _ in shape[2:])),
    "no dimensions": lambda shape: torch.randn(()),
    "one dimension": lambda shape: torch.randn(shape[-1]),
    "a dimension too few": lambda shape: torch.randn(shape[1:]),
    "a dimension too many": lambda shape: torch.randn(2, *shape),
    "two dimensions too many": lambda shape: torch.randn(2, 1, *shape),
    "double": lambda shape: torch.randn(shape).double(),
    "half": lambda shape: torch.randn(shape).half(),
    "integers": lambda shape: torch.ones(shape, dtype=torch.long),
    "booleans": lambda shape: torch.ones(shape, dtype=torch.bool),
    "complex": lambda shape: torch.ones(shape, dtype=torch.complex64),
    "another device": lambda shape: torch.randn(shape, device="meta"),
    "None": lambda shape: None,
    "a list": lambda shape: [1.0, 2.0],
    "NumPy": lambda shape: torch.randn(shape).numpy(),
}

CONFIGS = {
    "compact": br.RazorConfig(0.9),
    "exact": br.RazorConfig(0.0, values="float32", norm="int8", activation="int8", attention="int8"),
    "paper": br.RazorConfig.paper(0.5),
}

# A razored layer may refuse a call by the same type of exception only; these say more than the dense layer does.
OWN_WORDS = {f"activation='{word}' has no float64 form" for word in ("auto", "int8", "int4", "int2")}


def test_every_drop_in_has_a_row() -> None:
    covered = {qualified_name(type(build())) for build, _ in LAYERS.values()}
    assert covered | ELSEWHERE == set(DROP_INS)


def called(model: nn.Module, argument: object, requires_grad: bool) -> object:
    """The output, or the exception."""
    argument = argument.clone() if isinstance(argument, Tensor) else argument
    if requires_grad and isinstance(argument, Tensor) and argument.is_floating_point():
        argument = argument.requires_grad_() + 0  # no leaf: in place is allowed
    arguments = (argument,) * 3 if isinstance(model[0], nn.MultiheadAttention) else (argument,)
    options = {"need_weights": False} if isinstance(model[0], nn.MultiheadAttention) else {}
    torch.manual_seed(0)
    try:
        out = model[0](*arguments, **options)
    except Exception as error:
        return error
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.filterwarnings("ignore")  # of PyTorch's own about strange calls, dense and razored
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", LAYERS)
def test_bad_calls(name: str, config: str) -> None:
    build, shape = LAYERS[name]
    plain = nn.Sequential(build())
    razored = copy.deepcopy(plain)
    br.razor_(razored, CONFIGS[config])
    for call, make in CALLS.items():
        for requires_grad in (False, True):
            argument = make(shape)
            wanted, got = (called(model, argument, requires_grad) for model in (plain, razored))
            words = f"{name}, {call}, requires_grad={requires_grad}: dense {wanted!r:.200}, razored {got!r:.200}"
            if isinstance(got, TypeError) and any(own in str(got) for own in OWN_WORDS):
                assert isinstance(argument, Tensor) and argument.dtype == torch.float64, words
            elif isinstance(wanted, Exception):
                assert type(got) is type(wanted), words
            else:
                assert not isinstance(got, Exception), words
                assert (got.shape, got.dtype, got.device) == (wanted.shape, wanted.dtype, wanted.device), words
                if got.device.type == "meta":
                    continue
                if "Attention" in name or "Encoder" in name:  # equal to the formula, not to the fused kernel's bits
                    assert_close(words, got, wanted, 1e-2 if got.dtype == torch.float16 else 1e-5)
                else:
                    assert_same_bits(words, got, wanted)
    for (key, a), b in zip(razored.state_dict().items(), plain.state_dict().values(), strict=True):
        assert_same_bits(key, a, b)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "mobilenetv3_small_100", "regnety_002"])
def test_one_image_with_maps_of_one_position(name: str) -> None:
    """Batch statistics of one value: refused, and the running statistics stay as they are."""
    plain = timm.create_model(name, num_classes=3).train()
    razored = copy.deepcopy(plain)
    br.razor_(razored)
    x = torch.randn(1, 3, 32, 32)
    for model in (plain, razored):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            model(x)
    assert all(bool(b.isfinite().all()) for b in razored.buffers())


def _chain(channels: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    chain = nn.Sequential(nn.Conv2d(3, 8, 1), norm(channels), nn.ReLU())
    chain[1].eval().requires_grad_(False)
    return chain


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("chain", "x"),
    [
        (lambda: _chain(2), lambda: torch.randn(2, 3, 8, 8)),  # statistics of another number of channels
        (lambda: _chain(8, nn.BatchNorm1d), lambda: torch.randn(2, 3, 8, 8)),
        (lambda: _chain(8), lambda: torch.randn(2, 4, 8, 8)),
        (lambda: _chain(8), lambda: torch.randn(2, 3, 8)),
        (lambda: _chain(8), lambda: torch.ones(2, 3, 8, 8, dtype=torch.long)),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU()), lambda: torch.randn(3, 5)),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU()), lambda: torch.ones(3, 6, dtype=torch.long)),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.GELU()), lambda: torch.randn(3, 6, dtype=torch.float64)),
    ],
)
def test_bad_calls_of_a_chain(chain: Callable[[], nn.Module], x: Callable[[], Tensor], grad: bool) -> None:
    plain = chain()
    razored = copy.deepcopy(plain)
    br.razor_(razored)
    with torch.set_grad_enabled(grad):
        with pytest.raises(Exception) as wanted:
            plain(x())
        with pytest.raises(wanted.type):
            razored(x())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_go_dense(layout: torch.layout) -> None:
    plain = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    razored = copy.deepcopy(plain)
    br.razor_(razored)
    x = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)], layout=layout)
    for ours, theirs in zip(razored(x).unbind(), plain(x).unbind(), strict=True):
        assert_same_bits("part", ours, theirs)
