"""Attention: the forward beside the unfused formula and SDPA, the gradients beside their oracles, under every mask."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import backrazor as br
from backrazor import functional
from backrazor.codecs import Pruned, Rows, pack
from backrazor.functional import AttentionCodec

from .compare import LIMITS, assert_close, assert_same_bits

PRUNED = Pruned(0.7, "float32")
RULES = ["pruned", "int8", "int4"]
SHAPES = [(2, 3, 8, 8, 16, 16), (1, 2, 5, 123, 7, 5)]  # B, H, N, M, d, e
MASKS = ["none", "bool", "additive", "causal", "per head", "broadcast", "learned"]


def _mask(form: str, b: int, h: int, n: int, m: int) -> Tensor | None:
    if form in ("none", "causal"):
        return None
    if form == "bool":
        return (torch.rand(b, 1, n, m) < 0.7).index_fill(3, torch.tensor([0]), True)
    shape = {"additive": (b, h, n, m), "per head": (h, n, m), "broadcast": (n, m), "learned": (1, h, n, m)}[form]
    return torch.randn(shape).requires_grad_(form == "learned")


def _additive(mask: Tensor | None, n: int, m: int, causal: bool) -> Tensor | None:
    if causal:
        mask = torch.ones(n, m, dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        return torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    return mask


def _unfused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = (q * scale) @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(-1) @ v


def _inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    b, h, n, m, d, e = shape
    return tuple(torch.randn(b, h, *size, requires_grad=True) for size in ((n, d), (m, d), (m, e)))


@pytest.mark.parametrize("form", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_attention(rule: str, shape: tuple[int, ...], form: str, flag: Tensor) -> None:
    _, _, n, m, d, _ = shape
    q, k, v = _inputs(shape)
    mask, causal, scale = _mask(form, *shape[:4]), form == "causal", d**-0.5
    out = functional.attention(q, k, v, mask, 0.0, causal, scale, AttentionCodec(rule, PRUNED), flag)
    bias = _additive(mask, n, m, causal)
    assert_same_bits("output", out, _unfused(q, k, v, bias, scale))
    assert_close("output beside SDPA", out, F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal), 1e-5)

    grad = torch.randn_like(out)
    out.backward(grad)
    hats = _read(rule, q, k, v, flag)
    twin = None if bias is None else bias.detach().clone().requires_grad_(form == "learned")
    if rule == "pruned":
        expected = _paper_gradients(q, k, v, bias, scale, grad, hats, flag)
    else:
        inputs = [x.clone().requires_grad_() for x in hats]
        dense = _unfused(*inputs, twin, scale)
        wanted = [*inputs, twin] if form == "learned" else inputs
        expected = torch.autograd.grad(dense, wanted, grad)
    names = ["q", "k", "v", "mask"]
    for name, x, oracle in zip(names, (q, k, v, mask), expected, strict=False):
        if name != "mask":
            assert_close(f"gradient of {name}", x.grad, oracle, 1e-5)
        elif form == "learned":
            assert_close("gradient of the mask", x.grad, oracle.sum_to_size(x.shape), 1e-5)


def _read(rule: str, q: Tensor, k: Tensor, v: Tensor, flag: Tensor) -> list[Tensor]:
    """q, k and v as backward reads them."""
    tensors = [x.detach() for x in (q, k, v)]
    if rule == "pruned":
        return [pack(x, PRUNED, flag).unpack() for x in tensors]
    bits = int(rule.removeprefix("int"))
    return [Rows(bits, mean).pack(x).unpack() for x, mean in zip(tensors, (True, False, True), strict=True)]


def _paper_gradients(q, k, v, bias, scale, grad, hats, flag) -> list[Tensor]:
    """The softmax's backward from its pruned output, the products from pruned q, k and v; the last is the gradient of
    the scores' addend."""
    q_hat, k_hat, v_hat = (x.double() for x in hats)
    scores = (q * scale) @ k.transpose(-2, -1)
    p = (scores if bias is None else scores + bias).softmax(-1).detach()
    p_hat, grad = pack(p, PRUNED, flag).unpack().double(), grad.double()
    grad_p = grad @ v_hat.transpose(-2, -1)
    grad_scores = p_hat * (grad_p - (grad_p * p_hat).sum(-1, keepdim=True))
    return [
        grad_scores @ k_hat * scale,
        grad_scores.transpose(-2, -1) @ q_hat * scale,
        p_hat.transpose(-2, -1) @ grad,
        grad_scores,
    ]


@pytest.mark.parametrize("rule", ["int8", "int4"])
def test_dropout_draws_as_the_unfused_formula(rule: str, flag: Tensor) -> None:
    q, k, v = _inputs((2, 3, 8, 8, 16, 16))
    torch.manual_seed(3)
    out = functional.attention(q, k, v, None, 0.3, False, 0.25, AttentionCodec(rule, PRUNED), flag)
    grad = torch.randn_like(out)
    out.backward(grad)
    torch.manual_seed(3)
    hats = [x.clone().requires_grad_() for x in _read(rule, q, k, v, flag)]
    p = ((q * 0.25) @ k.transpose(-2, -1)).softmax(-1)
    assert_same_bits("output", out, (F.dropout(p, 0.3) @ v))
    torch.manual_seed(3)
    dense = F.dropout(((hats[0] * 0.25) @ hats[1].transpose(-2, -1)).softmax(-1), 0.3) @ hats[2]
    for name, x, oracle in zip("qkv", (q, k, v), torch.autograd.grad(dense, hats, grad), strict=True):
        assert_close(f"gradient of {name}", x.grad, oracle, 1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_scaled_scores_are_the_formula_that_scales_them(rule: str, flag: Tensor) -> None:
    q, k, v = _inputs((2, 3, 8, 9, 12, 12))
    codec, scale = AttentionCodec(rule, PRUNED), 0.3
    outs = [functional.attention(q, k, v, None, 0.0, False, scale, codec, flag, late) for late in (True, False)]
    assert_same_bits("output", outs[0], ((q @ k.transpose(-2, -1)) * scale).softmax(-1) @ v)
    grads = [torch.autograd.grad(out, (q, k, v), torch.ones_like(out)) for out in outs]
    for name, scores, query in zip("qkv", *grads, strict=True):
        assert_close(f"gradient of {name}", scores, query, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_in_16_bits(rule: str, dtype: torch.dtype, flag: Tensor) -> None:
    tensors = [x.detach().to(dtype).requires_grad_() for x in _inputs((2, 3, 9, 11, 16, 16))]
    out = functional.attention(*tensors, None, 0.0, False, 0.25, AttentionCodec(rule, PRUNED), flag)
    assert_same_bits("output", out, _unfused(*tensors, None, 0.25))
    grad = torch.randn_like(out)
    out.backward(grad)
    hats = _read(rule, *(x.detach() for x in tensors), flag)
    if rule == "pruned":
        expected = _paper_gradients(*tensors, None, 0.25, grad, hats, flag)
    else:
        wide = [x.double().requires_grad_() for x in hats]
        expected = torch.autograd.grad(_unfused(*wide, None, 0.25), wide, grad.double())
    for name, x, oracle in zip("qkv", tensors, expected, strict=False):
        assert_close(f"gradient of {name}", x.grad, oracle, LIMITS[dtype])


@pytest.mark.parametrize("rule", RULES)
def test_masks_are_kept_as_given_and_a_causal_one_not_at_all(rule: str, flag: Tensor) -> None:
    """Layers share a bool mask: one byte per element, once."""
    q, k, v = _inputs((2, 3, 8, 8, 16, 16))
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    kept = []
    for forms in (({},) * 2, ({"mask": mask},) * 2, ({"is_causal": True},) * 2):
        with br.memory.ledger(torch.nn.Identity()) as book:
            outs = [
                functional.attention(q, k, v, form.get("mask"), 0.0, "is_causal" in form, 1.0, codec, flag)
                for form, codec in zip(forms, [AttentionCodec(rule, PRUNED)] * 2, strict=True)
            ]
        kept.append(book.total_bytes)
        del outs
    assert kept == [kept[0], kept[0] + mask.numel(), kept[0]]


def test_gradcheck_of_the_dense_limit(flag: Tensor) -> None:
    codec = AttentionCodec("pruned", Pruned(0.0, "float32"))
    tensors = [torch.randn(2, 2, n, d, dtype=torch.float64, requires_grad=True) for n, d in ((3, 4), (5, 4), (5, 2))]
    mask = torch.randn(1, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    run = lambda q, k, v, m: functional.attention(q, k, v, m, 0.0, False, 0.5, codec, flag)  # noqa: E731
    assert torch.autograd.gradcheck(run, (*tensors, mask))


def test_nothing_is_kept_without_a_gradient(flag: Tensor) -> None:
    q, k, v = (x.detach() for x in _inputs(SHAPES[0]))
    out = functional.attention(q, k, v, None, 0.0, False, 0.25, AttentionCodec("int4", PRUNED), flag)
    assert out.grad_fn is None
