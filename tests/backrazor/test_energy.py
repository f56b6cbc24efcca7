"""The energy that survives: by layer, equal to what the codec keeps, without a trace in the step itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import backrazor as br
from backrazor.codecs import Pruned, pack


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8 * 36, 5))
    return nn.Sequential(*layers)


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_rows_are_what_the_codec_keeps() -> None:
    model, x = network(), torch.randn(4, 3, 8, 8)
    br.razor_(model, br.RazorConfig(0.9, values="float32", fill="zero"))
    inputs = []
    model[-1].register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].detach()))
    with br.kept_energy(model) as energy:
        loss = model(x).sum()
    assert loss.requires_grad and [row.module for row in energy.rows] == ["0", "5"]
    for row, seen in zip(energy.rows, (x, inputs[0]), strict=True):
        x_hat = pack(seen, Pruned(0.9, "float32"), torch.zeros(1, dtype=torch.int32)).unpack()
        assert row.kept_energy == pytest.approx(float(x_hat.square().sum() / seen.square().sum()), rel=1e-5)
        assert row.sparsity == pytest.approx(float((x_hat == 0).float().mean()), rel=1e-6)
        assert 0.1 < row.kept_energy < 1 and row.sparsity > 0.89


@pytest.mark.parametrize("config", [br.RazorConfig(0.9), br.RazorConfig.paper(0.9)], ids=["compact", "paper"])
def test_the_step_is_the_same_with_and_without(config: br.RazorConfig) -> None:
    model, x = network(), torch.randn(4, 3, 8, 8)
    model[1].eval()
    br.razor_(model, config)
    plain = gradients(model, x)
    with br.kept_energy(model) as energy:
        seen = gradients(model, x)
    assert len(energy.rows) == 2
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    assert not any(module._forward_hooks for module in model.modules())


def test_several_forwards_count_together_and_frozen_or_gradless_ones_not_at_all() -> None:
    model, x = network(), torch.randn(6, 3, 8, 8)
    model.eval()
    br.razor_(model, br.RazorConfig(0.9, values="float32", fill="zero"))
    with br.kept_energy(model) as whole:
        model(x)
    with br.kept_energy(model) as parts:
        for micro in x.split(2):
            model(micro)
    assert [r.kept_energy for r in parts.rows] == pytest.approx([r.kept_energy for r in whole.rows], rel=1e-5)
    model[0].weight.requires_grad_(False)
    with br.kept_energy(model) as some, torch.no_grad():
        model(x)
    assert some.rows == []
    with br.kept_energy(model) as some:
        model(x)
    assert [row.module for row in some.rows] == ["5"]


def test_an_input_of_zeros_has_no_share() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    br.razor_(model)
    with br.kept_energy(model) as energy:
        model(torch.zeros(2, 8))
    (row,) = energy.rows
    assert row.sparsity == 1 and row.kept_energy != row.kept_energy
