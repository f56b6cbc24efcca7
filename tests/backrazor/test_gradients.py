"""compare_gradients: exact where nothing is lost, ordered where something is, and without a trace on the model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import backrazor as br


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 64), nn.GELU(), nn.Dropout(0.2), nn.LayerNorm(64), nn.Linear(64, 5))


def _loss(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, torch.arange(len(logits)) % 5)


EXACT = br.RazorConfig(0.0, values="float32", norm="dense", activation="dense", attention="dense", rest="dense")


def test_nothing_lost_is_cosine_one():
    comparison = br.compare_gradients(_network(), torch.randn(8, 24), _loss, EXACT)
    assert comparison.cosine == pytest.approx(1, abs=1e-12)
    assert comparison.loss == comparison.dense_loss
    assert all(row.relative_norm == pytest.approx(1, abs=1e-6) for row in comparison.rows)


def test_cosine_falls_with_sparsity_and_matches_autograd():
    model, x = _network(), torch.randn(8, 24)
    comparisons = [br.compare_gradients(model, x, _loss, br.RazorConfig(s)) for s in (0.5, 0.9, 0.97)]
    cosines = [comparison.cosine for comparison in comparisons]
    assert 1 > cosines[0] > cosines[1] > cosines[2] > 0
    dense, razored = copy.deepcopy(model), copy.deepcopy(model)
    br.razor_(razored, br.RazorConfig(0.9))
    flat = []
    for twin in (dense, razored):
        with torch.random.fork_rng():
            _loss(twin(x)).backward()
        flat.append(torch.cat([p.grad.flatten().double() for p in twin.parameters()]))
    assert cosines[1] == pytest.approx(F.cosine_similarity(*flat, dim=0).item(), abs=1e-12)


def test_layers_add_up_to_the_whole():
    comparison = br.compare_gradients(_network(), torch.randn(8, 24), _loss, br.RazorConfig(0.9))
    assert [row.name for row in comparison.by_layer()] == ["0", "3", "4"]
    (whole,) = comparison.by_layer(lambda name: "all")
    assert (whole.cosine, whole.dense_norm) == pytest.approx((comparison.cosine, comparison.overall.dense_norm))
    assert comparison.table().splitlines()[-1].endswith("overall")


def test_leaves_model_and_random_state_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Dropout(0.5), nn.Linear(288, 5))
    br.razor_(model, br.RazorConfig.paper(0.8))
    state = copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    random = torch.get_rng_state()
    br.compare_gradients(
        model, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), _loss, br.RazorConfig(0.9)
    )
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == classes
    assert all(p.grad is None for p in model.parameters())


def test_nothing_to_train():
    model = _network().requires_grad_(False)
    x = torch.randn(8, 24, requires_grad=True)
    with pytest.raises(ValueError, match="no parameter of Sequential received a gradient"):
        br.compare_gradients(model, x, _loss)
