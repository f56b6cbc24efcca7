"""The examples run as they stand, only shorter, and learn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from examples import plain_loop, transformers_trainer


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


def test_transformers_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    assert transformers_trainer.main(["--steps", "60"]) > 40
    assert "x Linear" in capsys.readouterr().out
