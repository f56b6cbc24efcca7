"""ViT-B/16: the table in docs/method.md against the ledger, and the measured peak of a step against the prediction."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import backrazor as br

METHOD = Path(__file__).parents[2] / "docs" / "method.md"
TOKENS = 197
# rows of the table, by the modules of a block whose ledger rows make them up; a role stands where one is meant
ROWS = {
    "LayerNorm 1 input": ("norm1",),
    "qkv input": ("attn.qkv",),
    "q, k, v": ("attn",),
    "attention output = proj input": ("attn.proj",),
    "LayerNorm 2 input": ("norm2",),
    "fc1 input": ("mlp.fc1", "pruned"),
    "GELU input": ("mlp.fc1", "quantised"),
    "fc2 input": ("mlp.fc2",),
}


def vit(depth: int = 12) -> torch.nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model("vit_base_patch16_224", num_classes=100, depth=depth).train()


def step(sparsity: float, batch: int = 2) -> br.memory.Step:
    """SGD with momentum on random images."""
    model = vit()
    br.razor_(model, br.RazorConfig(sparsity))
    x, y = torch.randn(batch, 3, 224, 224), torch.arange(batch)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    return br.memory.Step(model, lambda: F.cross_entropy(model(x), y), optimizer)


@pytest.mark.slow
def test_the_measured_peak_is_the_predicted_one() -> None:
    measured = br.memory.measure_step(functools.partial(step, 0.9), repeats=1, what=("peak",)).peak_bytes
    model = vit()
    br.razor_(model, br.RazorConfig(0.9))
    predicted = br.memory.predict(model, (3, 224, 224), 2)
    assert measured == pytest.approx(predicted.peak_bytes, rel=0.1)
