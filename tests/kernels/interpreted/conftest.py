"""These tests need Triton's interpreter, which is chosen before Python imports Triton: ``test_interpreted.py`` beside
this folder runs them in a process of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("BACKRAZOR_KERNELS") == "interpret"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    # the interpreter mistakes a tensor of shifts that a constant took part in for a constant, and warns of any
    config.addinivalue_line("filterwarnings", "ignore:Value .* exceeds the maximum bitwidth:UserWarning")


@pytest.fixture(autouse=True)
def _strict_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every launch runs under ``StrictExecutor``, and ``torch.empty`` is poisoned."""
    from triton.runtime import interpreter

    from tests.kernels.interpreted.harness import StrictExecutor

    monkeypatch.setattr(interpreter, "GridExecutor", StrictExecutor)
    monkeypatch.setattr(StrictExecutor, "order", "forward")
    monkeypatch.setattr(StrictExecutor, "launches", 0)
    monkeypatch.setattr(StrictExecutor, "programs", 0)
    torch.manual_seed(0)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)
