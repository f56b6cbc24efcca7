"""Weight gradients straight from the packed input: those of the dense product with x_hat, summed in another order."""

from __future__ import annotations

import copy
import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import backrazor as br
from backrazor import kernels
from backrazor.codecs import Pruned, PrunedForm, pack, products
from backrazor.kernels import Window
from backrazor.kernels.product import cpu, reference
from backrazor.kernels.product.layout import Masked
from backrazor.kernels.topk.reference import pack_bits, unpack
from tests.backrazor.compare import assert_same_bits
from tests.backrazor.samples import sample

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STORED = [*product(("int4", "int8", "bfloat16", "float16", "float32"), ("tile", "bitmap"))]
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
    "kernel larger than the input": ((4, 3, 2), 8, (5, 5), (1, 1), (2, 2), (1, 1), False),
    "one position": ((40, 1, 1), 33, (1, 1), (1, 1), (0, 0), (1, 1), False),
    "depthwise, wide padding": ((4, 6, 5), 4, (3, 3), (1, 1), (4, 3), (1, 1), True),
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


def conv_gradient(
    stored, x: Tensor, grad: Tensor, index: str, window: Window, implementation=None, masked: Masked | None = None
) -> Tensor:
    """By the operator, or by one of the two modules that implement it."""
    outputs = grad.shape[1]
    sums = torch.zeros(kernels.product_sums_shape(window, outputs))
    if implementation is None:
        kernels.add_conv_product(sums, grad, *stored, index, *window, *(masked or ()))
    else:
        implementation.conv(sums, grad, kernels.Stored(*stored), index, window, masked)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name, case in CONVS.items() if not case[-1]])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_conv_with_a_guess_where_the_mask_says_so(name: str, dtype: torch.dtype, share: float) -> None:
    shape, outputs, *numbers, _ = CONVS[name]
    window = Window(shape, *numbers, False)
    batch, n = 3, math.prod(shape)
    draw = torch.Generator().manual_seed(7)
    mask = torch.rand(batch, n, generator=draw) < share
    guess = torch.rand(batch, shape[0], generator=draw) + 0.5
    masked = Masked(pack_bits(mask), guess)
    weight = torch.zeros(outputs, shape[0], *window.kernel, dtype=torch.float64)
    settings = window.stride, window.padding, window.dilation, False, (0, 0), 1
    x = sample("normal", (batch, *shape), seed=1)
    out = torch.ops.aten.convolution(x.double(), weight, None, *settings)
    grad = sample("normal", tuple(out.shape), dtype, seed=99)
    for values, index in (("int8", "tile"), ("float32", "bitmap")):
        stored = packed(x, max(n // 6, 1), values, index)
        x_hat = x_hat_of(stored, x, index) + mask.view(batch, *shape) * guess[:, :, None, None]
        asked = False, True, False
        wanted = torch.ops.aten.convolution_backward(grad.double(), x_hat, weight, None, *settings, asked)[1]
        assert_near(f"{values}, {index}", conv_gradient(stored, x, grad, index, window, masked=masked), wanted)
        assert_near("reference", conv_gradient(stored, x, grad, index, window, reference, masked), wanted)


def test_the_mask_is_no_more_than_its_bytes() -> None:
    """The last line's bits end with the memory that is there."""
    shape, outputs, *numbers, _ = CONVS["3 x 3"]
    window = Window(shape, *numbers, False)
    n = math.prod(shape)
    whole = torch.full((2 * -(-n // 8) + 4096,), 255, dtype=torch.uint8)
    mask = whole[-2 * -(-n // 8) :].view(2, -1)
    x, guess = torch.randn(2, *shape), torch.ones(2, shape[0])
    stored, grad = packed(x, 100, "float32", "bitmap"), torch.randn(2, outputs, 14, 14)
    ours = conv_gradient(stored, x, grad, "bitmap", window, masked=Masked(mask, guess))
    assert_near(
        "last line", ours, conv_gradient(stored, x, grad, "bitmap", window, reference, Masked(mask, guess)).double()
    )


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linears_on_any_number_of_threads_in_several_matrices(dtype: torch.dtype, monkeypatch) -> None:
    x, grad = torch.randn(5, 40, 24), torch.randn(5, 40, 50).to(dtype)
    stored = packed(x, 96, "int8", "tile")
    found = []
    for threads, size in ((1, 4 << 20), (2, 4 << 20), (3, 1), (1, 2 * 40 * 64 * 4)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(cpu, "MATRIX_BYTES", size)
        sums = torch.zeros(24, 64)
        kernels.add_linear_product(sums, grad, *stored, "tile")
        found.append(sums)
    for other in found[1:2]:
        assert_same_bits("threads", found[0], other)
    for other in found[2:]:
        assert_near("pieces", other, found[0].double())


def test_some_samples_of_what_is_packed() -> None:
    """What a chunk of a backward hands over: rows of the stored tensors from the middle."""
    shape, outputs, *numbers, depthwise = CONVS["3 x 3"]
    window, x = Window(shape, *numbers, depthwise), sample("normal", (7, *CONVS["3 x 3"][0]))
    grad = sample("normal", (7, outputs, *shape[1:]), seed=1)
    for values, index in STORED:
        stored = packed(x, x[0].numel() // 10, values, index)
        sums = torch.zeros(kernels.product_sums_shape(window, outputs))
        for start, stop in ((0, 3), (3, 4), (4, 7)):
            part = [t[start:stop] if t.numel() else t for t in stored]
            kernels.add_conv_product(sums, grad[start:stop], *part, index, *window)
        whole = conv_gradient(stored, x, grad, index, window)
        got = kernels.product_transposed(sums.flatten(0, 1), outputs).view(whole.shape)
        assert_near(f"{values}, {index}", got, whole.double())


def test_empty_batches_add_nothing() -> None:
    stored = packed(torch.zeros(0, 20, 8), 16, "int8", "tile")
    sums = torch.zeros(8, 16)
    for implementation in (cpu, reference):
        implementation.linear(sums, torch.zeros(0, 20, 16), kernels.Stored(*stored), "tile")
    assert not sums.any()


def test_turning_over_never_gives_a_view() -> None:
    for inputs, outputs in ((1, 16), (1, 9), (16, 16), (3, 7)):
        sums = torch.randn(inputs, -(-outputs // 16) * 16)
        turned = kernels.product_transposed(sums, outputs)
        assert_same_bits("turned", turned, sums[:, :outputs].t())
        assert turned.is_contiguous() and turned.data_ptr() != sums.data_ptr()


@pytest.mark.parametrize(
    ("stride", "dilation"), [((2, 2), (1, 1)), ((1, 1), (1, 8))], ids=["a stride", "too wide for a vector"]
)
def test_depthwise_windows_without_a_product_are_refused(stride: tuple[int, int], dilation: tuple[int, int]) -> None:
    window = Window((4, 40, 40), (3, 3), stride, (8, 8), dilation, True)
    size = [(40 + 16 - 2 * d - 1) // s + 1 for s, d in zip(stride, dilation, strict=True)]
    assert not kernels.conv_fits(window, 4, tuple(size))
    x = torch.randn(1, 4, 40, 40)
    with pytest.raises(ValueError, match="no depthwise product"):
        conv_gradient(packed(x, 100, "int8", "tile"), x, torch.randn(1, 4, *size), "tile", window)


def test_offsets_beyond_32_bits_are_left_to_the_dense_product() -> None:
    wide = Window((3, 2048, 2048), (3, 3), (1, 1), (1, 1), (1, 1), False)
    assert not kernels.conv_fits(wide, 256, (2048, 2048)) and kernels.conv_fits(wide, 128, (2048, 2048))
    assert not kernels.linear_fits(2**20, 16, 2048) and kernels.linear_fits(2**20, 16, 512)
    assert not kernels.linear_fits(16, 16, 0)


@pytest.mark.parametrize("n", [100, 101, 102, 103, 104, 200_704])
def test_at_a_sparsity_of_08_the_kept_are_few(n: int) -> None:
    x, flag, grad = torch.empty(1, n), torch.zeros(1, dtype=torch.int32), torch.empty(1, 4)
    assert products._multiplies(pack(x, Pruned(0.8, "int8"), flag).form, grad)
    assert not products._multiplies(pack(x, Pruned(0.7, "int8"), flag).form, grad)


def test_samples_in_several_matrices_and_short_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What large activations and processors without 512-bit registers do."""
    shape, outputs, *numbers, depthwise = CONVS["3 x 3, strided"]
    window, x = Window(shape, *numbers, depthwise), sample("normal", (5, *CONVS["3 x 3, strided"][0]))
    grad, stored = sample("normal", (5, outputs, 8, 7), seed=1), packed(x, x[0].numel() // 10, "int8", "tile")
    whole = conv_gradient(stored, x, grad, "tile", window)
    monkeypatch.setattr(cpu, "MATRIX_BYTES", 1)
    monkeypatch.setattr(cpu, "has_avx512", lambda: False)
    assert_near("pieces", conv_gradient(stored, x, grad, "tile", window), whole.double())


def chain() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    layers[1].eval().requires_grad_(False)
    return layers


UNLIKE = {  # layers that have no product
    "groups": lambda: nn.Conv2d(8, 16, 3, padding=1, groups=2),
    "reflected": lambda: nn.Conv2d(8, 16, 3, padding=1, padding_mode="reflect"),
    "depthwise, strided": lambda: nn.Conv2d(8, 8, 3, 2, padding=1, groups=8),
    "depthwise, small": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "one position": lambda: nn.Conv2d(8, 8, 16),
}


def reads(monkeypatch: pytest.MonkeyPatch) -> list:
    """Grows with every dense copy of a pruned input."""
    unpacked, read = [], PrunedForm.read
    monkeypatch.setattr(PrunedForm, "read", lambda *given: unpacked.append(given) or read(*given))
    return unpacked


@pytest.mark.parametrize("name", UNLIKE)
def test_other_convolutions_unpack(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked = reads(monkeypatch)
    assert weight_gradient(UNLIKE[name](), torch.randn(4, 8, 16, 16), 0.9).any()
    assert unpacked


LAYERS = {
    "linear": (lambda: nn.Linear(40, 24), (4, 32, 40)),
    "linear and GELU": (lambda: nn.Sequential(nn.Linear(40, 24), nn.GELU()), (4, 32, 40)),
    "conv": (lambda: nn.Conv2d(8, 16, 3, 2, padding=1), (4, 8, 16, 16)),
    "same padding": (lambda: nn.Conv2d(8, 16, 4, padding="same"), (4, 8, 16, 16)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), (4, 8, 28, 28)),
    "chain": (chain, (4, 8, 16, 16)),
    "depthwise 5 x 5": (lambda: nn.Conv2d(8, 8, 5, padding=2, groups=8), (4, 8, 7, 7)),
}


def weight_gradient(dense: nn.Module, x: Tensor, sparsity: float) -> Tensor:
    model = nn.Sequential(copy.deepcopy(dense))
    br.razor_(model, br.RazorConfig(sparsity, fill="zero"))
    out = model(x.clone().requires_grad_())
    out.backward(sample("normal", tuple(out.shape), seed=1))
    return next(model.parameters()).grad


@pytest.mark.parametrize("name", LAYERS)
def test_no_dense_copy_where_little_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 0.9 the backward of a layer unpacks nothing, at 0.5 it does; the gradient is the same either way."""
    make, shape = LAYERS[name]
    dense, x, unpacked = make(), torch.randn(shape), reads(monkeypatch)
    weight_gradient(dense, x, 0.5)
    assert unpacked
    unpacked.clear()
    direct = weight_gradient(dense, x, 0.9)
    assert not unpacked
    monkeypatch.setattr(products, "MOST_KEPT", 0.0)
    by_copy = weight_gradient(dense, x, 0.9)
    assert unpacked
    assert_near(name, direct, by_copy.double())
