"""Operators against their oracles: the forward equals dense to the bit, gradients are those of tests/oracles.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import backrazor as br
from backrazor import functional
from backrazor.codecs import Bits, Pruned, Use, activation_of, pack, pack_derivative, remember_activation
from backrazor.codecs.inputs import pack_input
from tests.backrazor.cases import AXES, PRUNING, pairwise
from tests.backrazor.compare import LIMITS, assert_close, assert_same_bits
from tests.backrazor.samples import layouts
from tests.oracles import channel_scale_at, vjp_at

CONFIG = {"norm": "dense", "activation": "dense", "attention": "dense"}


def razored(layer: nn.Module, **fields: object) -> nn.Module:
    """A converted copy; the layer itself stays plain."""
    copied = copy.deepcopy(layer)
    br.razor_(copied, br.RazorConfig(**(CONFIG | fields)))
    return copied


def x_hat_of(x: Tensor, codec: Pruned, weight: Tensor) -> Tensor:
    """What the codec gives back of x; an input without a batch is one sample."""
    flag = torch.zeros(1, dtype=torch.int32)
    batched = x if x.dim() >= (4 if weight.dim() == 4 else 2) else x.unsqueeze(0)
    return pack_input(batched.detach(), codec, Use.of(weight), activation_of(x), flag).unpack().view(x.shape)


def rectified(x: Tensor) -> Tensor:
    """ReLU of x, with the note and the bits that the razored one leaves."""
    out = x.relu()
    remember_activation(out, pack_derivative(out, Bits()))
    return out


@pytest.mark.parametrize("name", PRUNING)
def test_gradients_are_those_at_x_hat(name: str) -> None:
    case = PRUNING[name]
    for number, setting in enumerate(pairwise(AXES)):
        torch.manual_seed(number)
        plain = case.build().to(setting["dtype"])
        x = torch.randn(case.shape).to(setting["dtype"])
        found = layouts(x) if x.dim() > 1 else {}
        x = found.get(setting["layout"], x)
        x = rectified(x) if setting["rectified"] else x
        fields = {key: setting[key] for key in ("sparsity", "values", "index", "fill")}
        layer = razored(nn.Sequential(plain, nn.Linear(1, 1)), **fields)[0]  # which is not the head
        check_case(f"{name}: {setting}", plain, layer, x, setting["trained"])


def check_case(name: str, plain: nn.Module, layer: nn.Module, x: Tensor, trained: str) -> None:
    for each in (plain, layer):
        for key, parameter in each.named_parameters():
            parameter.requires_grad_(trained in ("all", key))
    x.requires_grad_(trained in ("all", "input"))
    out = layer(x)
    assert_same_bits(f"forward of {name}", out, plain(x))
    wanted = {key: p for key, p in layer.named_parameters() if p.requires_grad} | (
        {"input": x} if x.requires_grad else {}
    )
    if not wanted:
        assert not out.requires_grad, name
        return
    grad = torch.randn_like(out)
    got = dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), grad), strict=True))
    oracle = vjp_at(plain, x_hat_of(x, layer.razor.pruned, layer.weight), grad)
    for key, gradient in got.items():
        assert gradient.dtype == x.dtype, f"{key} of {name}"
        assert_close(f"{key} of {name}", gradient, oracle[key], LIMITS[x.dtype])


@pytest.mark.parametrize(
    "name", ["linear over tokens", "conv, padding and stride", "conv, reflect", "conv, uneven same"]
)
def test_chunks_add_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward in chunks of one sample gives what one chunk gives."""
    monkeypatch.setattr("backrazor.functional.common.CHUNK_BYTES", 1)
    case = PRUNING[name]
    for dtype in (torch.float32, torch.bfloat16):
        plain = case.build().to(dtype)
        check_case(f"{name} in chunks", plain, razored(plain, sparsity=0.5), torch.randn(case.shape).to(dtype), "all")


class LargestAllocation(TorchDispatchMode):
    """The most elements of any tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_the_weight_gradient_of_linear_has_no_batch() -> None:
    batch, inputs, outputs = 32, 64, 48
    layer = razored(nn.Linear(inputs, outputs), sparsity=0.5)
    x = torch.randn(batch, 5, inputs, requires_grad=True)
    with LargestAllocation() as largest:
        layer(x).sum().backward()
    assert 0 < largest.elements <= batch * 5 * inputs  # (B, O, I) would be 98,304 elements


def test_a_tracked_allocation_is_seen() -> None:
    with LargestAllocation() as largest:
        torch.einsum("bo,bi->boi", torch.randn(32, 48), torch.randn(32, 64)).sum()
    assert largest.elements >= 32 * 48 * 64


@pytest.mark.parametrize("gate_shape", [(5, 7, 1, 1), (1, 7, 1, 1), (7, 1, 1), (5, 1, 6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_channel_scale(gate_shape: tuple[int, ...], dtype: torch.dtype, flag: Tensor) -> None:
    codec = Pruned(0.8, "int8", "tile")
    for layout, x in layouts(torch.randn(5, 7, 6, 4).to(dtype)).items():
        for train_x, train_gate in ((True, True), (True, False), (False, True), (False, False)):
            x, gate = x.detach().requires_grad_(train_x), torch.rand(gate_shape).to(dtype).requires_grad_(train_gate)
            out = functional.channel_scale(x, gate, codec, flag)
            assert_same_bits(f"forward, {layout}", out, x * gate)
            wanted = [t for t in (x, gate) if t.requires_grad]
            if not wanted:
                continue
            grad = torch.randn_like(out)
            oracle = channel_scale_at(pack(x.detach(), codec, flag).unpack(), gate, grad)
            expected = [o for o, t in zip(oracle, (x, gate), strict=True) if t.requires_grad]
            for name, got, want in zip(("x", "gate"), torch.autograd.grad(out, wanted, grad), expected, strict=False):
                assert_close(f"{name}, {layout}", got, want, LIMITS[dtype])


EXACT = {
    "dropout": (lambda: nn.Dropout(0.3), (5, 123)),
    "dropout of all": (lambda: nn.Dropout(1.0), (5, 7)),
    "dropout of none": (lambda: nn.Dropout(0.0), (5, 7)),
    "max pool": (lambda: nn.MaxPool2d(2), (3, 5, 9, 8)),
    "max pool, overlapping": (lambda: nn.MaxPool2d(3, 2, 1), (3, 5, 9, 8)),
    "max pool, dilation": (lambda: nn.MaxPool2d((2, 3), 1, padding=1, dilation=2), (3, 5, 9, 8)),
    "max pool, ceil": (lambda: nn.MaxPool2d(3, 2, ceil_mode=True), (2, 5, 10, 8)),
    "max pool, uneven": (lambda: nn.MaxPool2d((5, 1), (3, 2), padding=(2, 0)), (2, 3, 11, 6)),
    "max pool, video": (lambda: nn.MaxPool3d((3, 2, 3), (2, 2, 1), (1, 0, 1)), (2, 3, 7, 9, 8)),
    "max pool, video, dilation": (lambda: nn.MaxPool3d(2, 1, 1, dilation=2, ceil_mode=True), (2, 3, 6, 5, 7)),
    "max pool, large window": (lambda: nn.MaxPool2d(16), (2, 3, 33, 32)),
    "average pool to one": (lambda: nn.AdaptiveAvgPool2d(1), (3, 5, 7, 6)),
    "average pool to a grid": (lambda: nn.AdaptiveAvgPool2d((3, 2)), (3, 5, 7, 6)),
    "average pool of one image": (lambda: nn.AdaptiveAvgPool2d((None, 2)), (5, 7, 6)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_gradients_of_lossless_operators_are_those_of_dense(name: str, dtype: torch.dtype) -> None:
    build, shape = EXACT[name]
    plain = build()
    layer = razored(plain)
    for layout, x in layouts(torch.randn(shape).to(dtype)).items():
        ours, theirs = (x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
        torch.manual_seed(3)
        out = layer(ours)
        torch.manual_seed(3)
        expected = plain(theirs)
        assert_same_bits(f"forward of {name}, {layout}", out, expected)
        grad = torch.randn_like(out)
        out.backward(grad)
        expected.backward(grad)
        assert_close(f"gradient of {name}, {layout}", ours.grad, theirs.grad, LIMITS[dtype])


def test_max_pool_hands_ties_to_the_same_element() -> None:
    layer = razored(nn.MaxPool2d(3, 2, 1))
    ours, theirs = (torch.zeros(2, 3, 7, 7).requires_grad_() for _ in range(2))
    layer(ours).sum().backward()
    F.max_pool2d(theirs, 3, 2, 1).sum().backward()
    assert_same_bits("gradient", ours.grad, theirs.grad)


def test_a_pool_with_too_large_a_window_is_left() -> None:
    model = nn.Sequential(nn.MaxPool2d(17), nn.MaxPool2d(2, return_indices=True), nn.ReLU())
    report = br.razor_(model)
    assert [row.name for row in report.left] == ["0", "1"]
    assert "256" in report.left[0].reason


def test_dropout_is_the_identity_in_eval() -> None:
    layer = razored(nn.Dropout(0.5)).eval()
    x = torch.randn(4, 5, requires_grad=True)
    assert layer(x) is x or torch.equal(layer(x), x)
