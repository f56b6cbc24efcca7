"""A training step of whole networks on the CUDA path, its kernels in the interpreter, beside the reference path."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import backrazor as br
from backrazor.codecs import Pruned
from backrazor.functional import AttentionCodec, attention
from backrazor.kernels import dispatch
from tests.backrazor.compare import assert_close
from tests.backrazor.networks import convnet
from tests.kernels.interpreted.harness import StrictExecutor


class Block(nn.Module):
    """A transformer's block without its attention: norm, two Linears, GELU, dropout."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(width), nn.LayerNorm((width,), elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Dropout(0.2), nn.Linear(40, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.mlp(self.norm(x)))


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    out = model(x)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()} | {"input": x.grad, "output": out.detach()}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (br.RazorConfig.compact(0.8), 1e-5),
        (br.RazorConfig.paper(0.8), 1e-5),
        (br.RazorConfig.int8(), 1e-5),
    ],
    ids=["compact", "paper", "int8"],
)
@pytest.mark.parametrize(("build", "shape"), [(Block, (3, 7, 24)), (convnet, (2, 3, 17, 16))], ids=["block", "convnet"])
def test_a_step_on_both_paths(build, shape, config, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, x = build(), torch.randn(shape)
    ours, theirs = (copy.deepcopy(plain) for _ in range(2))
    br.razor_(ours, config)
    br.razor_(theirs, config)
    got = gradients(ours, x)
    launched = StrictExecutor.launches
    monkeypatch.setattr(dispatch, "forced", lambda: "reference")
    expected = gradients(theirs, x)
    assert launched > 5
    assert StrictExecutor.launches == launched
    for name, gradient in got.items():
        assert_close(name, gradient, expected[name], limit)


@pytest.mark.parametrize("rule", ["pruned", "int4"])
@pytest.mark.parametrize("learned_mask", [False, True])
def test_attention_on_both_paths(rule: str, learned_mask: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = [torch.randn(2, 3, 9, 5, requires_grad=True) for _ in range(3)]
    mask = torch.randn(2, 3, 9, 9).requires_grad_() if learned_mask else None
    leaves += [mask] if learned_mask else []
    codec, flag = AttentionCodec(rule, Pruned(0.5, "float32")), torch.zeros(1, dtype=torch.int32)
    found = []
    for forced in ("interpret", "reference"):
        monkeypatch.setattr(dispatch, "forced", lambda forced=forced: forced)
        torch.manual_seed(5)
        out = attention(*leaves[:3], mask, 0.3, False, 0.4, codec, flag)
        found.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out) * out.detach())))
    for name, got, wanted in zip(("output", "q", "k", "v", "mask"), *found, strict=False):
        assert_close(name, got, wanted, 1e-5)


def test_the_output_of_a_fused_norm_feeds_the_next_layer_from_its_codes() -> None:
    model = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 8))
    x = torch.randn(3, 7, 24)
    plain = copy.deepcopy(model)
    br.razor_(model, br.RazorConfig.compact(0.9))
    with br.memory.ledger(model) as ledger:
        out = model(x)
    assert not [row for row in ledger.rows if row.role == "pruned values"]
    assert_close("output", out, plain(x), 1e-6)
    assert F.mse_loss(out, plain(x)) < 1e-10
