"""Memory that runs out in a run: one line, and what was saved stays good."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY

from razorlab.training import loop
from razorlab.training.full import OutOfMemory, fits, is_full
from razorlab.training.step import Stepper

SHORT = ("trainer.batch_size=30", "data.train_fraction=0.06", "trainer.steps=4", "trainer.save_every=1", "optim=sgd")
CUDA = "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.94 GiB is "


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError(CUDA), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
    ids=str,
)
def test_memory_is_full_in_whoevers_words(error: Exception, expected: bool) -> None:
    assert is_full(error) == expected
    with pytest.raises(OutOfMemory if expected else type(error)) as raised, fits("step 3", "do less", "all is well"):
        raise error
    if expected:
        text = str(raised.value)
        assert text.startswith("step 3: memory is full (") and text.endswith("); all is well; do less")
        assert "\n" not in text and len(text) < 260


def full_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    """Let the ``call``-th call of a function fail for want of memory, after half of its work."""
    real, calls = getattr(owner, name), []

    def failing(*arguments, **options):
        calls.append(1)
        result = real(*arguments, **options)
        if len(calls) == call:
            raise torch.OutOfMemoryError(CUDA + "free.\nOf the allocated memory 70 GiB is allocated by PyTorch")
        return result

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("half", ["gradients", "update"])
def test_a_step_without_memory_ends_in_one_line_and_loses_nothing(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: str
) -> None:
    with monkeypatch.context() as patch:
        full_at(patch, Stepper, half, 3)
        code, lines = command(*TINY, *SHORT)
    (path,) = tmp_path.glob("outputs/**/checkpoints/step-00000002.pt")
    assert code == 2 and not path.with_name("step-00000003.pt").exists(), "a step half done is not saved"
    (line,) = (line for line in lines if line.startswith("train.py: "))
    assert line.startswith("train.py: step 3: memory is full (CUDA out of memory. Tried to allocate 2.25 GiB.")
    assert f"last good checkpoint {path.relative_to(tmp_path)}; with more memory free the same command goes on" in line
    assert "lower trainer.batch_size or set trainer.micro_batch, raise razor.sparsity" in line
    assert not any("Traceback" in line for line in lines)
    code, lines = command(*TINY, *SHORT)
    assert code == 0 and any("resumed after epoch 0, step 2" in line for line in lines)


def test_the_first_backward_without_memory_has_no_checkpoint_to_name(
    command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_at(monkeypatch, Stepper, "gradients", 1)
    code, lines = command(*TINY, *SHORT)
    assert code == 2 and "; no checkpoint yet; else lower trainer.batch_size" in lines[-1]


def test_an_evaluation_without_memory_saves_the_run(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        full_at(patch, loop, "evaluate", 1)
        code, lines = command(*TINY, *SHORT, "trainer.save_every=1000")
    assert code == 2
    assert lines[-1].startswith("train.py: evaluation: memory is full (CUDA out of memory.")
    assert "the run is saved; with more memory free the same command goes on" in lines[-1]
    assert "trainer.eval_batch_size" in lines[-1]
    assert list(tmp_path.glob("outputs/**/checkpoints/step-*.pt"))
    code, lines = command(*TINY, *SHORT, "trainer.save_every=1000")
    assert code == 0 and any("resumed after epoch 0" in line for line in lines)
