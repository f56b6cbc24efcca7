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
# Rows of the table and what of a block's ledger they stand for: modules, and the role where a module has two rows.
GROUPS: tuple[tuple[tuple[str, ...], tuple[tuple[str, str | None], ...]], ...] = (
    (("LayerNorm 1 input and statistics",), (("norm1", None),)),
    (("qkv input",), (("attn.qkv", None),)),
    # autograd's attention node holds its output too, which is the projection's input: one storage, counted once
    (
        ("q, k, v", "softmax output", "attention output = proj input"),
        (("attn", None), ("attn.proj", None)),
    ),
    (("LayerNorm 2 input and statistics",), (("norm2", None),)),
    (("fc1 input",), (("mlp.fc1", "pruned values"), ("mlp.fc1", "index"), ("mlp.fc1", "scales"), ("mlp.fc1", "dense"))),
    (("GELU input",), (("mlp.fc1", "quantised"), ("mlp.act", None))),
    (("fc2 input",), (("mlp.fc2", None),)),
)


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
@pytest.mark.slow
def test_the_measured_peak_is_the_predicted_one() -> None:
    measured = br.memory.measure_step(functools.partial(step, 0.9), repeats=1, what=("peak",)).peak_bytes
    model = vit()
    br.razor_(model, br.RazorConfig(0.9))
    predicted = br.memory.predict(model, (3, 224, 224), 2)
    assert measured == pytest.approx(predicted.peak_bytes, rel=0.1)


def published_table() -> dict[str, tuple[int, ...]]:
    """Bytes per token (dense, paper, compact) by row of docs/method.md."""
    cell = r"(\d+)(?: \([^|]*\))?"
    rows = re.findall(rf"^\| ([^|]+?) \| \d* ?\| {cell} \| {cell} \| {cell} \|$", METHOD.read_text(), re.M)
    return {name: tuple(map(int, sizes)) for name, *sizes in rows}


def block_bytes(config: br.RazorConfig | None) -> dict[tuple[str, str], int]:
    """Bytes of one block at one image by module and role, modules named inside the block."""
    model = vit(depth=1)
    if config is not None:
        br.razor_(model, config)
    with br.memory.ledger(model) as book:
        loss = model(torch.randn(1, 3, 224, 224)).sum()
    found: dict[tuple[str, str], int] = {}
    for row in book.rows:
        if row.module.startswith("blocks.0."):
            key = row.module.removeprefix("blocks.0."), row.role
            found[key] = found.get(key, 0) + row.bytes
    del loss
    return found


@pytest.mark.parametrize("column", [0, 1, 2], ids=["dense", "paper", "compact"])
def test_the_table_of_a_block_is_the_ledger(column: int) -> None:
    table = published_table()
    config = (None, br.RazorConfig.paper(0.9), br.RazorConfig.compact(0.9))[column]
    ledger = block_bytes(config)
    assert {name for names, _ in GROUPS for name in names} == set(table) - {"sum"}
    for names, parts in GROUPS:
        measured = sum(
            size for (module, role), size in ledger.items() if (module, role) in parts or (module, None) in parts
        )
        assert sum(table[name][column] for name in names) == pytest.approx(measured / TOKENS, abs=1), names
    assert table["sum"][column] == round(sum(ledger.values()) / TOKENS)
