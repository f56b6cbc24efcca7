"""The primitives as operators of ``torch.library``: their fake versions, and what ``torch.compile`` makes of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import backrazor as br
from backrazor import kernels
from backrazor.codecs.smooth import quantiser
from backrazor.kernels import dispatch
from backrazor.kernels.layernorm import ops
from backrazor.kernels.layernorm import reference as layernorm
from tests.backrazor.compare import assert_close, assert_same_bits, gradients_on
from tests.backrazor.networks import convnet, mlp


def arguments(device: str = "cpu") -> dict[str, tuple]:
    """Arguments of every operator, by name."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    x, flag = normal(3, 300), torch.zeros(1, dtype=torch.int32, device=device)
    thresholds, levels = (part.to(device) for part in quantiser("gelu", 4))
    packed = kernels.topk_pack(x, 30, "int8", "tile", flag)
    told, no_limits = kernels.level_encode(x, thresholds, 4), (float("nan"), float("nan"))
    guessed = kernels.guess_pack(x, 30, "int4", "tile", 10, False, *no_limits, told, levels, flag)
    codes, scales = kernels.row_encode(x, x.mean(1), x.std(1), 4)
    rstd = x.std(1)
    p = normal(2, 3, 5, 7).softmax(-1)
    bits = kernels.mask_encode(normal(2, 105), 0.0, float("nan"))
    return {
        "topk_pack": (x, 30, "int8", "tile", flag),
        "topk_unpack": (*packed, 300, "tile", torch.bfloat16),
        "topk_unpack_normalised": (*packed, normal(3, 10), normal(3, 10), 300, 30, "tile", torch.float32),
        "mask_encode": (x, 0.0, 6.0),
        "mask_apply": (x, kernels.mask_encode(x, 0.0, 6.0)),
        "mask_clamp_": (x.clone(), 0.0, 1.0),
        "mask_scale": (normal(2, 5, 3, 7), bits, x.std(1)[[0, 1, 2, 0, 1]], None, 1e-3),
        "level_encode": (x, thresholds, 4),
        "level_apply": (x, kernels.level_encode(x, thresholds, 4), levels, 4),
        "guess_pack": (x, 30, "int4", "tile", 10, False, *no_limits, told, levels, flag),
        "guess_unpack": (*guessed, told, levels, 300, False, "tile", torch.float32),
        "row_encode": (x, x.mean(1), x.std(1), 4),
        "row_decode": (codes, scales, 300, 4, torch.bfloat16, normal(300), None),
        "norm_forward": (x, normal(300), None, 1e-5, 8),
        "norm_backward": (x, codes, scales, rstd, normal(300), 4),
        "softmax_backward": (normal(2, 3, 5, 7), p, bits, 1.25, 0.5),
        "add_linear_product": (normal(20, 16), normal(3, 15, 9), *packed, "tile"),
        "add_conv_product": (
            normal(3, 9, 16),
            normal(3, 7, 10, 10),
            *packed,
            "tile",
            *((3, 10, 10), (3, 3), (1, 1), (1, 1), (1, 1), False),
            *(kernels.mask_encode(x, 0.0, 1.0), normal(3, 3)),
        ),
        "product_transposed": (normal(20, 16), 9),
    }


def test_every_operator_has_arguments() -> None:
    named = {name for name in kernels.__all__ if isinstance(getattr(kernels, name), torch._ops.OpOverload)}
    assert named == set(arguments())


@pytest.mark.parametrize("name", arguments())
def test_opcheck(name: str) -> None:
    """Schema, fake version and dispatch agree with what the operator does. No operator has a derivative of its own."""
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(kernels, name), arguments()[name], test_utils=tests)


@pytest.mark.parametrize("name", arguments())
def test_compiled_as_one_graph(name: str) -> None:
    torch._dynamo.reset()  # the tests share one function: no limit on how often it is compiled anew
    given, again = arguments()[name], arguments()[name]  # some operators add to an argument
    function = getattr(kernels, name)
    compiled = torch.compile(lambda *inputs: function(*inputs), backend="aot_eager", fullgraph=True)
    got, wanted = tree_leaves((compiled(*given), given)), tree_leaves((function(*again), again))
    for a, b in zip(got, wanted, strict=True):
        if isinstance(a, Tensor):
            assert_same_bits(name, a, b)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("affine", [False, True])
def test_the_norm_is_torchs_at_the_kept_input(affine: bool, bits: int) -> None:
    """Forward to the bit; backward: PyTorch's own on the normalised input as kept, whose mean is 0 and deviation 1."""
    x, grad = torch.randn(9, 40) * 3 + 1, torch.randn(9, 40)
    weight, bias = (torch.randn(40), torch.randn(40)) if affine else (None, None)
    out, codes, scales, rstd = kernels.norm_forward(x, weight, bias, 1e-5, bits)
    expected, mean, deviation = torch.native_layer_norm(x, (40,), weight, bias, 1e-5)
    assert_same_bits("output", out, expected)
    assert_same_bits("codes", codes, kernels.row_encode(x, mean.flatten(), deviation.flatten(), bits)[0])
    z = kernels.row_decode(codes, scales, 40, bits, torch.float32)
    zero, one = torch.zeros(9, 1), torch.ones(9, 1)
    mask = [True, affine, affine]
    wanted = torch.ops.aten.native_layer_norm_backward(grad, z, (40,), zero, one, weight, bias, mask)
    got = kernels.norm_backward(grad, codes, scales, rstd, weight, bits)
    assert_close("input", got[0], wanted[0] * rstd.unsqueeze(1), 1e-5)
    if affine:
        assert_close("weight", got[1], wanted[1], 1e-5)
        assert_close("bias", got[2], wanted[2], 1e-5)


def test_softmax_backward_is_autograds() -> None:
    scores = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    grad, kept = torch.randn(2, 3, 5, 7, dtype=torch.float64), torch.rand(2, 3, 5, 7) > 0.3
    p = (0.5 * scores).softmax(-1)
    (wanted,) = torch.autograd.grad(p * kept / 0.7, scores, grad)
    bits = kernels.mask_encode(kept.double().flatten(1), 0.0, float("nan"))
    assert_close("scores", kernels.softmax_backward(grad, p.detach(), bits, 1 / 0.7, 0.5), wanted, 1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@pytest.mark.parametrize("preset", ["compact", "paper"])
@pytest.mark.parametrize(("build", "shape"), [(mlp, (6, 5, 20)), (convnet, (4, 3, 33, 33))], ids=["mlp", "convnet"])
def test_a_compiled_network_has_the_eager_gradients(build, shape: tuple[int, ...], preset: str) -> None:
    """Drop-ins break the graph; what runs between the breaks must not be Dynamo's idea of a kernel's inside."""
    torch._dynamo.reset()
    model, x, found = build(), torch.randn(shape), []
    br.razor_(model, getattr(br.RazorConfig, preset)(0.9))
    for run in (model, torch.compile(copy.deepcopy(model), backend="aot_eager")):
        torch.manual_seed(0)
        run(x).square().mean().backward()
        found.append([p.grad for p in run.parameters()])
    for number, (got, wanted) in enumerate(zip(*found, strict=True)):
        assert_close(f"parameter {number}", got, wanted, 1e-6)


def test_no_fusion_is_claimed_on_the_cpu() -> None:
    assert not kernels.fused_norm(torch.randn(3, 4), 4)
    assert not kernels.fused_softmax(torch.randn(3, 4))


@pytest.mark.parametrize(("choice", "fused"), [(None, False), ("triton", True), ("interpret", True)])
def test_a_norm_that_rounds_otherwise_is_off_by_default(
    choice: str | None, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "implementation", lambda family, tensor: layernorm)  # as a CUDA tensor would have it
    monkeypatch.setattr(dispatch, "forced", lambda: choice)
    assert kernels.fused_norm(torch.randn(3, 4), 4) is fused
    assert not kernels.fused_norm(torch.randn(3, 4), 0)


def test_an_empty_norm() -> None:
    out, codes, scales, rstd = layernorm.forward(torch.zeros(0, 5), None, None, 1e-5, 8)
    assert (out.shape, codes.shape, scales.shape, rstd.shape) == ((0, 5), (0, 5), (0,), (0,))
    gradients = layernorm.backward(torch.zeros(0, 5), codes, scales, rstd, None, 8)
    assert [tuple(g.shape) for g in gradients] == [(0, 5), (5,), (5,)]


def test_gradients_on_one_device_leave_nothing_for_the_next() -> None:
    model, x = mlp(), torch.randn(6, 5, 20)
    first, second = (gradients_on(model, x, "cpu") for _ in range(2))
    assert not x.requires_grad and x.grad is None and all(p.grad is None for p in model.parameters())
    for name, gradient in first.items():
        assert_same_bits(name, second[name], gradient)


@pytest.mark.parametrize("name", arguments())
def test_the_default_device_is_not_asked(name: str) -> None:
    """Scratch and results lie where the operands do; else a CPU kernel would be handed an address on a GPU."""
    given, again = arguments()[name], arguments()[name]
    wanted = tree_leaves((getattr(kernels, name)(*again), again))
    with torch.device("meta"):
        got = tree_leaves((getattr(kernels, name)(*given), given))
    for a, b in zip(got, wanted, strict=True):
        if isinstance(a, Tensor):
            assert_same_bits(name, a, b)
