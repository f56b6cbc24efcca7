"""With nothing pruned, float32 values, and norms and activations dense, training is dense training."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import backrazor as br
from tests.backrazor.compare import assert_close, assert_same_bits, relative_rms
from tests.backrazor.networks import Attention, convnet, freeze_norms, mlp

DENSE_LIMIT = br.RazorConfig(0.0, values="float32", norm="dense", activation="dense", attention="dense", rest="dense")

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp(0.2), (6, 20)),
    "convnet": (lambda: convnet(inplace=True, dropout=0.2), (6, 3, 12, 12)),
    "convnet with frozen norms": (lambda: freeze_norms(convnet()), (6, 3, 12, 12)),
    "attention": (lambda: Attention(12), (4, 7, 12)),
}


def both(name: str) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    build, shape = NETWORKS[name]
    plain = build()
    ours = copy.deepcopy(plain)
    br.razor_(ours, DENSE_LIMIT)
    return plain, ours, shape


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_equal_dense_and_no_index_is_stored(name: str) -> None:
    plain, ours, shape = both(name)
    x, roles = torch.randn(shape), set()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outs = []
    for model, leaf in zip((plain, ours), inputs, strict=True):
        torch.manual_seed(1)
        with br.memory.ledger(model) as book:
            outs.append(model(leaf))
        if model is ours:
            modules = dict(model.named_modules())
            roles = {row.role for row in book.rows if not isinstance(modules.get(row.module), nn.MaxPool2d)}
        outs[-1].square().sum().backward()
    assert_same_bits("forward", *outs)
    assert not roles & {"index", "pruned values", "scales"}
    assert_close("input", inputs[1].grad, inputs[0].grad, 1e-5)
    for (key, expected), got in zip(plain.named_parameters(), ours.parameters(), strict=True):
        # what a batch norm cancels (a bias before it, a scale before a convolution before it) has a gradient of
        # rounding errors: its parts of order one sum up to less than 1e-3
        if expected.requires_grad and float(expected.grad.norm()) > 1e-3:
            assert_close(key, got.grad, expected.grad, 1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradcheck_in_double_precision(name: str) -> None:
    _, ours, shape = both(name)
    ours = ours.double()
    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = torch.randn(2, *shape[1:], dtype=torch.float64, requires_grad=True)
    parameters = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    assert torch.autograd.gradcheck(lambda *_: ours(x), (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("name", NETWORKS)
def test_fifty_steps_beside_dense(name: str) -> None:
    plain, ours, shape = both(name)
    optimizers = [torch.optim.SGD(model.parameters(), 0.02, momentum=0.9) for model in (plain, ours)]
    generator = torch.Generator().manual_seed(5)
    losses = []
    for step in range(50):
        x = torch.randn(shape, generator=generator)
        pair = []
        for model, optimizer in zip((plain, ours), optimizers, strict=True):
            torch.manual_seed(step)
            out = model(x).flatten(1)
            loss = F.cross_entropy(out, torch.arange(shape[0]) % out.shape[1])
            optimizer.zero_grad()
            loss.backward()
            br.check_finite(model)
            optimizer.step()
            pair.append(loss.item())
        losses.append(pair)
    steps = torch.tensor(losses)
    assert steps[-10:, 0].mean() < steps[:10, 0].mean()
    assert_close("losses", steps[:, 1], steps[:, 0], 1e-3)
    for (key, expected), got in zip(plain.named_parameters(), ours.parameters(), strict=True):
        if float(expected.detach().norm()) > 1e-3:
            assert_close(key, got, expected, 1e-3)


def test_pruning_changes_what_backward_sees() -> None:
    """The limit is a limit: at sparsity 0.9 gradients do differ."""
    plain, x = mlp(), torch.randn(6, 20)
    ours = copy.deepcopy(plain)
    br.razor_(ours, br.RazorConfig(0.9, values="float32", fill="zero", norm="dense", activation="dense"))
    for model in (plain, ours):
        model(x).square().sum().backward()
    assert relative_rms(ours[0].weight.grad, plain[0].weight.grad) > 1e-2
