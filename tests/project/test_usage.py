"""docs/usage.md: what it says of the front door runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

import backrazor as br
from examples.own_layer import GatedUnit

TEXT = (Path(__file__).resolve().parents[2] / "docs/usage.md").read_text(encoding="utf-8")


def block(section: str) -> str:
    """The first Python block of a section."""
    return re.findall(r"```python\n(.*?)```", TEXT.partition(f"## {section}\n")[2], re.DOTALL)[0]


def test_different_settings() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.ModuleDict({"attn": nn.Linear(4, 4), "mlp": nn.Sequential(nn.Linear(4, 4))})])
    model.head = nn.Linear(4, 2)
    names = {"br": br, "model": model}
    exec(block("Different settings for different layers"), names)
    rows = {row.name: (row.pattern, row.config.sparsity) for row in names["report"].replaced}
    assert rows == {"blocks.0.attn": ("*", 0.9), "blocks.0.mlp.0": ("blocks.*.mlp.*", 0.97)}


def test_own_layers() -> None:
    class Unit(GatedUnit):
        """One that no other test registers."""

    names = {"br": br, "GatedUnit": Unit}
    exec(block("Your own layers"), names)
    plain, x = Unit(8, 6), torch.randn(3, 8)
    expected = plain(x)
    report = br.razor_(plain)
    assert report.replaced[0].replacement == "RazorGatedUnit"
    assert torch.equal(plain(x), expected)
