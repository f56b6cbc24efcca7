"""Weights that are standardised in every forward are worked out again in backward, not kept."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import nn

import backrazor as br
from tests.backrazor.compare import assert_close, assert_same_bits

EXACT = br.RazorConfig(0.0, values="float32", norm="dense", activation="dense", fill="zero")


def network(layer: type[nn.Conv2d]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), layer(16, 32, 3, padding=1), nn.ReLU(), layer(32, 24, 1))


@pytest.mark.parametrize("layer", [ScaledStdConv2d, StdConv2d])
def test_gradients_are_equal_and_no_weight_is_kept(layer: type[nn.Conv2d]) -> None:
    plain, x = network(layer), torch.randn(4, 3, 20, 20)
    ours = copy.deepcopy(plain)
    br.razor_(ours, EXACT)
    with br.memory.ledger(ours) as book:
        out = ours(x)
    weights = {module.weight.numel() * 4 for module in plain if isinstance(module, layer)}
    assert not weights & {row.bytes for row in book.rows}
    assert_same_bits("forward", out, plain(x))
    grad = torch.randn_like(out)
    out.backward(grad)
    plain(x).backward(grad)
    for (name, got), expected in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert_close(name, got.grad, expected.grad, 1e-5)


def test_a_parameter_that_changes_before_backward_is_told() -> None:
    model = network(ScaledStdConv2d)
    br.razor_(model, EXACT)
    loss = model(torch.randn(2, 3, 12, 12)).sum()
    with torch.no_grad():
        model[3].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
