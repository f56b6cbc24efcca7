"""The examples run as they stand, only shorter, and learn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from examples import causal_lm, own_layer, plain_loop, transformers_trainer


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_plain_loop(capsys: pytest.CaptureFixture[str]) -> None:
    assert plain_loop.main(["--epochs", "1"]) > 40
    out = capsys.readouterr().out
    assert "overall" in out and "3 x Conv2d" in out and "MB razored" in out


def test_own_layer(capsys: pytest.CaptureFixture[str]) -> None:
    own_layer.main()
    out = capsys.readouterr().out
    assert "1 x GatedUnit: keeps the values at sparsity 0.9, the gate dense" in out and "3 x Linear" in out
    assert int(out.split("saved for backward: ")[1].split()[0]) < 250_000  # 461,828 dense, 276,036 without the drop-in
    assert len(Path(own_layer.__file__).read_text(encoding="utf-8").splitlines()) < 40


@pytest.mark.slow
def test_transformers_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    assert transformers_trainer.main(["--steps", "60"]) > 40
    assert "x Linear" in capsys.readouterr().out


def test_causal_lm(capsys: pytest.CaptureFixture[str]) -> None:
    losses = causal_lm.main(["--steps", "18"])
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", "dense", "razored"]
    rows = {line[:10].strip(): [float(word) for word in line[10:].split()] for line in lines}
    assert all(late < early - 0.5 for early, late in zip(rows["3"], rows["18"], strict=True)), "both learn"
    assert abs(losses["razored"] - losses["dense"]) < 0.3
    dense, razored = rows["saved, MB"]
    assert razored < dense / 5
