"""The example of a hard limit, two steps of it: ours trains where dense training and checkpointing are stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import hard_limit

ROOT = Path(__file__).resolve().parents[2]


def lines_of(*arguments: str) -> list[str]:
    command = [sys.executable, "examples/hard_limit.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[1:]  # after the warm-up's


@pytest.mark.slow
def test_ours_trains_where_the_others_are_stopped() -> None:
    kind, dense, checkpointing, ours = lines_of("--images", "16")
    assert kind.startswith("160 MB above what is loaded, by ") and kind.endswith("batch 8, 224 px")
    for name, line in (("dense", dense), ("checkpointing", checkpointing)):
        assert line.startswith(f"{name}: ") and ("can't allocate memory" in line or "killed at the limit" in line)
    assert ours.startswith("ours: trained 2 steps, loss ")


@pytest.mark.slow
def test_without_the_limit_in_the_way_every_row_trains_alike() -> None:
    _, *rows = lines_of("--limit", "2000", "--side", "112", "--images", "32")
    assert [row.partition(",")[0] for row in rows] == [f"{name}: trained 4 steps" for name in hard_limit.ROWS]
    losses = [row.split("loss ")[1].split(",")[0] for row in rows]
    assert losses[0] == losses[1], "checkpointing computes what dense does"
    assert losses[0].split()[0] == losses[2].split()[0], "the first forward is dense"


def test_checkpointing_and_dense_have_the_same_gradients() -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for row in ("dense", "checkpointing"):
        model = hard_limit.network(row, 0.97, images)
        model(images).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
