"""The guide and the README: what they say of the front door runs as it is written."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import backrazor as br
from examples.own_layer import GatedUnit

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/guide/layers.md").read_text(encoding="utf-8")


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
    exec(block("A drop-in for a class of your own"), names)
    plain, x = Unit(8, 6), torch.randn(3, 8)
    expected = plain(x)
    report = br.razor_(plain)
    assert report.replaced[0].replacement == "RazorGatedUnit"
    assert torch.equal(plain(x), expected)


def python_blocks(page: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/guide/first-razor.md"])
def test_the_first_lines_print_dense_and_razored_peak(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = python_blocks(page)[0]
    assert len([line for line in lines.splitlines() if line and not line.startswith("import")]) <= 5
    exec(lines, {})
    dense, razored = map(int, re.search(r"(\d+) MB dense, (\d+) MB razored", capsys.readouterr().out).groups())
    assert 600 < dense < 1000 and razored < dense / 3
    stated = re.search(r"(\d+) MB dense, (\d+) MB razored", (ROOT / page).read_text(encoding="utf-8"))
    if stated:
        assert (dense, razored) == tuple(map(int, stated.groups())), "what the page says it prints"


def test_the_guide_s_loops_and_looks_run() -> None:
    """Every block of these pages, on one small network."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    x, y = torch.randn(4, 3, 224, 224), torch.randint(0, 10, (4,))
    loss_fn = nn.CrossEntropyLoss()
    for page in ("docs/guide/first-razor.md", "docs/guide/sparsity.md", "docs/guide/memory.md"):
        model = copy.deepcopy(network)
        names = {"br": br, "torch": torch, "F": nn.functional, "model": model, "loss_fn": loss_fn, "x": x, "y": y}
        names |= {"images": x, "labels": y, "loader": [(x, y)], "build": lambda: copy.deepcopy(network)}
        names["optimizer"] = torch.optim.SGD(model.parameters(), 0.1)
        for block in python_blocks(page)[page.endswith("first-razor.md") :]:
            if "kept_energy(" in block:
                br.razor_(model)
            exec(block.replace("br.memory.measure_step(step)", "step()").partition("measured.peak_bytes")[0], names)


def test_markdown_lines_have_at_most_100_characters_and_whole_spans_of_code() -> None:
    """But for tables, headings, and links that cannot be broken."""
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")]:
        fenced = False
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            fence = line.lstrip().startswith("```")
            fenced ^= fence
            where = f"{page.relative_to(ROOT)}:{number}"
            free = fenced or line.startswith(("|", "#", "    ", "![")) or " " not in line.strip()
            assert free or len(line) <= 100, f"{where} has {len(line)} characters"
            assert fenced or fence or line.count("`") % 2 == 0, f"{where} breaks a span of code"
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150
