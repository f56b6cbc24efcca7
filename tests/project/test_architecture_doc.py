"""docs/architecture.md tells the ways as the code runs them: files that a layer really passes, and no more of them than
a reader can take."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import backrazor as br

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "src" / "backrazor"
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return TEXT.partition(f"## {title}\n")[2].partition("\n## ")[0]


def listed(title: str) -> list[str]:
    """The file of each numbered step."""
    return re.findall(r"^\d+\. `([^`]+)`", section(title), re.MULTILINE)


def files_of_a_step(sparsity: float) -> set[str]:
    """Files of the library whose functions run in a forward and backward of one Linear."""
    model = nn.Sequential(nn.Linear(40, 24))
    br.razor_(model, br.RazorConfig.paper(sparsity, values="int8", index="auto"))
    x, files = torch.randn(4, 32, 40), set()
    model(x).sum().backward()  # compiles

    def note(frame, event, argument) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(LIBRARY):
            files.add(path.relative_to(LIBRARY).as_posix())

    sys.setprofile(note)
    try:
        model(x).sum().backward()
    finally:
        sys.setprofile(None)
    return files


def test_the_way_of_an_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    way = listed("The way of one activation")
    assert len(way) <= 12 and len(set(way)) == len(way)
    ran = files_of_a_step(0.9)
    text = section("The way of one activation")
    aside = set(re.findall(r"`([\w/]+\.py)`", text.partition("Also run")[2]))
    behind = {file for file in ran if re.search(r"/(_cpu_\w+|cpu)\.py$|^kernels/cpu/", file)}
    # the definitions run in place of the fast versions where there is none
    assert {file for file in way if not file.endswith("reference.py")} <= ran
    assert ran - behind - {file for file in way if file.endswith("reference.py")} <= set(way) | aside


def test_the_way_of_a_setting() -> None:
    way = listed("The way of one setting")
    assert len(way) <= 9
    for name in way:
        content = (ROOT / name).read_text(encoding="utf-8")
        assert "sparsity" in content or "razor" in content, name
