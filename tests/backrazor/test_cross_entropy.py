"""Cross-entropy of a Linear's output, some rows at a time, and of maps brought to size, some samples at a time."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from backrazor import functional
from backrazor.functional import common
from tests.backrazor.compare import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings",
    [{}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"ignore_index": 3}],
    ids=["mean", "sum", "smoothed", "ignored"],
)
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
def test_equals_the_two_operators(dtype, settings: dict, has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "CHUNK_BYTES", 7 * 50 * 4)  # seven rows at once
    x, weight, bias = torch.randn(3, 9, 16), torch.randn(50, 16) / 4, torch.randn(50) if has_bias else None
    target = torch.randint(0, 50, (3, 9))
    target[0, :2] = settings.get("ignore_index", -100)
    results = []
    for compute in ("ours", "dense"):
        kind = dtype if compute == "ours" or dtype != torch.bfloat16 else torch.float64
        leaves = [None if t is None else t.to(dtype).to(kind).requires_grad_() for t in (x, weight, bias)]
        if compute == "ours":
            loss = functional.linear_cross_entropy(leaves[0], leaves[1], target, leaves[2], **settings)
        else:
            logits = F.linear(*leaves).flatten(0, 1)
            loss = F.cross_entropy(logits, target.flatten(), **settings)
        (3 * loss).backward()
        results.append([loss, *(t.grad for t in leaves if t is not None)])
    for got, expected in zip(*results, strict=True):
        assert_close("result", got, expected, 1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_nothing_of_the_size_of_the_logits_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "CHUNK_BYTES", 1 << 14)
    x, weight = torch.randn(64, 16, requires_grad=True), torch.randn(1000, 16)  # a frozen head
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        loss = functional.linear_cross_entropy(x, weight, torch.randint(0, 1000, (64,)))
    assert sizes == [64 * 16]
    loss.backward()
    assert weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings",
    [{}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"ignore_index": 3}],
    ids=["mean", "sum", "smoothed", "ignored"],
)
@pytest.mark.parametrize("size", [(24, 17), (5, 9)], ids=["stretched", "shrunk"])
def test_of_maps_equals_the_two_operators(dtype, settings: dict, size, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "CHUNK_BYTES", 2 * 7 * size[0] * size[1] * 4)  # two of five samples at once
    x = torch.randn(5, 7, 6, 9).to(dtype).contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, 7, (5, *size))
    target[torch.rand(target.shape) < 0.2] = settings.get("ignore_index", -100)
    ours, dense = x.clone().requires_grad_(), x.double().requires_grad_()
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        loss = functional.upsampled_cross_entropy(ours, target, **settings)
    assert sizes == [x.numel()], "the gradient of the scores alone is kept"
    expected = F.cross_entropy(F.interpolate(dense, size, mode="bilinear"), target, **settings)
    (3 * loss).backward()
    (3 * expected).backward()
    assert loss.dtype == torch.promote_types(dtype, torch.float32) and ours.grad.dtype == dtype
    assert_close("loss", loss, expected, 1e-5)
    assert_close("gradient", ours.grad, dense.grad, 5e-3 if dtype == torch.bfloat16 else 1e-5)


def test_of_maps_is_one_node_of_a_graph_and_refuses_what_does_not_fit() -> None:
    x, target = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randint(0, 4, (2, 8, 8))
    compute = torch.compile(functional.upsampled_cross_entropy, backend="aot_eager", fullgraph=True)
    losses = [f(x, target) for f in (compute, functional.upsampled_cross_entropy)]
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss, x)[0] for loss in losses))
    with pytest.raises(ValueError, match="do not fit"):
        functional.upsampled_cross_entropy(x, target[0])
    with pytest.raises(ValueError, match="reduction='none'"):
        functional.upsampled_cross_entropy(x, target, reduction="none")


def test_nothing_counts_and_nothing_is_asked_for() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8)
    target = torch.full((4,), -100)
    loss = functional.linear_cross_entropy(x, weight, target)
    assert loss.isnan() == F.cross_entropy(F.linear(x, weight), target).isnan()
    loss.backward()
    assert not x.grad.nan_to_num().any()
    with torch.no_grad():
        assert not functional.linear_cross_entropy(x, weight, target, reduction="sum").requires_grad


def test_autocast_keeps_sums_in_float32() -> None:
    x, weight = torch.randn(64, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    target = torch.randint(0, 50, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = functional.linear_cross_entropy(x, weight, target)
        expected = F.cross_entropy(F.linear(x, weight), target)
    assert loss.dtype == torch.float32
    assert_close("loss", loss, expected, 1e-2)
    got = torch.autograd.grad(loss, (x, weight))
    for g, e in zip(got, torch.autograd.grad(expected, (x, weight)), strict=True):
        assert g.dtype == e.dtype
        assert_close("gradient", g, e, 1e-2)


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"reduction": "none"}, "reduction='none'"), ({"target": torch.zeros(3).long()}, "do not fit")],
)
def test_wrong_arguments(changes: dict, word: str) -> None:
    arguments = {"x": torch.randn(4, 8), "weight": torch.randn(5, 8), "target": torch.zeros(4).long()} | changes
    with pytest.raises(ValueError, match=word):
        functional.linear_cross_entropy(**arguments)


def test_a_graph_that_is_kept_gives_the_same_again() -> None:
    x, weight = torch.randn(9, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    loss = 3 * functional.linear_cross_entropy(x, weight, torch.arange(9) % 5)
    first = [g.clone() for g in torch.autograd.grad(loss, (x, weight), retain_graph=True)]
    for a, b in zip(torch.autograd.grad(loss, (x, weight)), first, strict=True):
        assert torch.equal(a, b)
