"""Weight gradients straight from the packed input: those of the dense product with x_hat, summed in another order."""

from __future__ import annotations

import copy
from importlib import import_module
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import backrazor as br
from backrazor import kernels
from backrazor.codecs import products
from backrazor.kernels import Window
from backrazor.kernels.product import cpu, reference
from backrazor.kernels.topk.reference import unpack
from tests.backrazor.compare import assert_same_bits
from tests.backrazor.samples import sample

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STORED = [*product(("int8", "bfloat16", "float16", "float32"), ("tile", "bitmap"))]
LINEARS = [(1, 16, 5, 9), (3, 17, 64, 33), (2, 197, 48, 96), (4, 50, 300, 272), (2, 20, 31, 600)]  # B, T, I, O
# shape (C, H, W), D, kernel, stride, padding, dilation, depthwise
CONVS = {
    "pointwise": ((5, 7, 9), 6, (1, 1), (1, 1), (0, 0), (1, 1), False),
    "pointwise, whole vectors": ((32, 8, 8), 48, (1, 1), (1, 1), (0, 0), (1, 1), False),
    "pointwise, strided": ((8, 15, 14), 30, (1, 1), (2, 2), (0, 0), (1, 1), False),
    "3 x 3": ((16, 14, 14), 40, (3, 3), (1, 1), (1, 1), (1, 1), False),
    "3 x 3, strided": ((16, 15, 14), 300, (3, 3), (2, 2), (1, 1), (1, 1), False),
    "3 x 3, wide padding": ((4, 6, 5), 20, (3, 3), (1, 1), (4, 3), (1, 1), False),
    "stem": ((3, 33, 35), 32, (7, 7), (2, 2), (3, 3), (1, 1), False),
    "all unlike": ((8, 15, 14), 30, (3, 5), (1, 2), (2, 1), (2, 1), False),
    "stride over kernel": ((8, 15, 14), 30, (2, 2), (3, 2), (0, 1), (1, 2), False),
    "one output": ((8, 3, 3), 8, (3, 3), (1, 1), (0, 0), (1, 1), False),
    "depthwise": ((8, 15, 14), 8, (3, 3), (1, 1), (1, 1), (1, 1), True),
    "depthwise, 7 x 5": ((6, 17, 41), 6, (7, 5), (1, 1), (3, 2), (1, 1), True),
    "depthwise, dilated": ((6, 17, 19), 6, (3, 3), (1, 1), (2, 2), (2, 2), True),
}


def packed(x: Tensor, keep: int, values: str, index: str) -> tuple[Tensor, ...]:
    return kernels.topk_pack(x, keep, values, index, torch.zeros(1, dtype=torch.int32))


def x_hat_of(stored: tuple[Tensor, ...], x: Tensor, index: str) -> Tensor:
    return unpack(*stored, x[0].numel(), index, torch.float32).view(x.shape).double()


def assert_near(name: str, got: Tensor, wanted: Tensor) -> None:
    """``wanted`` in float64; float32 sums in any order lie within 1e-5 of the largest."""
    largest = wanted.abs().max()
    assert largest > 0, name
    assert ((got.double() - wanted).abs().max() / largest) < 1e-5, name


def conv_gradient(stored, x: Tensor, grad: Tensor, index: str, window: Window, implementation=None) -> Tensor:
    """By the operator, or by one of the two modules that implement it."""
    outputs = grad.shape[1]
    sums = torch.zeros(kernels.product_sums_shape(window, outputs))
    if implementation is None:
        kernels.add_conv_product(sums, grad, *stored, index, *window)
    else:
        implementation.conv(sums, grad, kernels.Stored(*stored), index, window)
    if window.depthwise:
        return sums[:, :, kernels.product_lanes(window, tuple(grad.shape[2:]))].unsqueeze(1)
    rows = kernels.product_transposed(sums.flatten(0, 1), outputs)
    return rows.view(outputs, window.shape[0], *window.kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_linear(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, tokens, inputs, outputs = shape
    for number, (values, index) in enumerate(STORED):
        x = sample("relu" if number % 2 else "normal", (batch, tokens, inputs), seed=number)
        grad = sample("normal", (batch, tokens, outputs), dtype, seed=99)
        stored = packed(x, max(tokens * inputs // 7, 1), values, index)
        wanted = torch.einsum("bto,bti->oi", grad.double(), x_hat_of(stored, x, index))
        rows = -(-outputs // 16) * 16
        ours, plain = torch.zeros(inputs, rows), torch.zeros(inputs, rows)
        kernels.add_linear_product(ours, grad, *stored, index)
        reference.linear(plain, grad, kernels.Stored(*stored), index)
        assert_near(f"{values}, {index}", kernels.product_transposed(ours, outputs), wanted)
        assert_near(f"reference, {values}, {index}", plain[:, :outputs].t(), wanted)
        kernels.add_linear_product(ours, grad, *stored, index)
        assert_near(f"added twice, {values}, {index}", kernels.product_transposed(ours, outputs), 2 * wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONVS)
def test_conv(name: str, dtype: torch.dtype) -> None:
    shape, outputs, *numbers, depthwise = CONVS[name]
    window = Window(shape, *numbers, depthwise)
    for number, (values, index) in enumerate(STORED):
        x = sample("relu" if number % 2 else "normal", (3, *shape), seed=number)
        weight = torch.zeros(outputs, 1 if depthwise else shape[0], *window.kernel, dtype=torch.float64)
        settings = window.stride, window.padding, window.dilation, False, (0, 0), shape[0] if depthwise else 1
        out = torch.ops.aten.convolution(x.double(), weight, None, *settings)
        grad = sample("normal", tuple(out.shape), dtype, seed=99)
        stored = packed(x, max(x[0].numel() // 6, 1), values, index)
        x_hat = x_hat_of(stored, x, index)
        asked = False, True, False
        wanted = torch.ops.aten.convolution_backward(grad.double(), x_hat, weight, None, *settings, asked)[1]
        assert_near(f"{values}, {index}", conv_gradient(stored, x, grad, index, window), wanted)
        assert_near("reference", conv_gradient(stored, x, grad, index, window, reference), wanted)


def test_tiles_that_are_full_and_tiles_that_are_empty() -> None:
    x = torch.randn(2, 24, 32)
    x.view(2, 3, 256)[:, 1] *= 1e3
    stored = packed(x, 256, "float32", "tile")
    assert stored[3].tolist() == [[0, 0, 0]] * 2 and stored[4].tolist() == [[2]] * 2  # a count of 256 is a bit
    grad, sums = torch.randn(2, 24, 16), torch.zeros(32, 16)
    kernels.add_linear_product(sums, grad, *stored, "tile")
    assert_near("full", sums, torch.einsum("bto,bti->io", grad.double(), x_hat_of(stored, x, "tile")))


@pytest.mark.parametrize("name", ["3 x 3", "3 x 3, strided", "depthwise"])
def test_any_number_of_threads_gives_the_same_bits(name: str) -> None:
    shape, outputs, *numbers, depthwise = CONVS[name]
    window, x = Window(shape, *numbers, depthwise), sample("normal", (5, *CONVS[name][0]))
    sizes = [
        (length + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for length, kernel, stride, pad, dilation in zip(shape[1:], *numbers, strict=True)
    ]
    grad, stored = sample("normal", (5, outputs, *sizes), seed=1), packed(x, x[0].numel() // 10, "int8", "tile")
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(conv_gradient(stored, x, grad, "tile", window))
    for other in found[1:]:
        assert_same_bits(name, found[0], other)


def test_samples_in_several_matrices_and_short_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What large activations and processors without 512-bit registers do."""
    shape, outputs, *numbers, depthwise = CONVS["3 x 3, strided"]
    window, x = Window(shape, *numbers, depthwise), sample("normal", (5, *CONVS["3 x 3, strided"][0]))
    grad, stored = sample("normal", (5, outputs, 8, 7), seed=1), packed(x, x[0].numel() // 10, "int8", "tile")
    whole = conv_gradient(stored, x, grad, "tile", window)
    monkeypatch.setattr(cpu, "MATRIX_BYTES", 1)
    monkeypatch.setattr(cpu, "has_avx512", lambda: False)
    assert_near("pieces", conv_gradient(stored, x, grad, "tile", window), whole.double())


LAYERS = {
    "linear": (lambda: nn.Linear(40, 24), (4, 32, 40), "linear"),
    "linear and GELU": (lambda: nn.Sequential(nn.Linear(40, 24), nn.GELU()), (4, 32, 40), "linear_act"),
    "conv": (lambda: nn.Conv2d(8, 16, 3, 2, padding=1), (4, 8, 16, 16), "conv"),
    "same padding": (lambda: nn.Conv2d(8, 16, 4, padding="same"), (4, 8, 16, 16), "conv"),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), (4, 8, 28, 28), "conv"),
    "depthwise 5 x 5": (lambda: nn.Conv2d(8, 8, 5, padding=2, groups=8), (4, 8, 7, 7), "conv"),
}


def weight_gradient(dense: nn.Module, x: Tensor, sparsity: float) -> Tensor:
    model = nn.Sequential(copy.deepcopy(dense))
    br.razor_(model, br.RazorConfig(sparsity))
    out = model(x.clone().requires_grad_())
    out.backward(sample("normal", tuple(out.shape), seed=1))
    return next(model.parameters()).grad


@pytest.mark.parametrize("name", LAYERS)
def test_no_dense_copy_where_little_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 0.9 the backward of a layer unpacks nothing, at 0.5 it does; the gradient is the same either way."""
    make, shape, operator = LAYERS[name]
    dense, x, unpacked = make(), torch.randn(shape), []
    module = import_module(f"backrazor.functional.{operator}")
    unpack = module.unpack
    monkeypatch.setattr(module, "unpack", lambda *given: unpacked.append(given) or unpack(*given))
    weight_gradient(dense, x, 0.5)
    assert unpacked
    unpacked.clear()
    direct = weight_gradient(dense, x, 0.9)
    assert not unpacked
    monkeypatch.setattr(products, "MOST_KEPT", 0.0)
    by_copy = weight_gradient(dense, x, 0.9)
    assert unpacked
    assert_near(name, direct, by_copy.double())
