"""Sparsity and kept energy of every layer over the course of a run, from the training steps themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
from torch import nn

import backrazor as br
from backrazor.energy import Energy

POINTS = 50  # of each curve: a step that is looked at unpacks every layer's input once more


class _Course(Protocol):
    """What is asked of the trainer: steps done, and to be done."""

    step: int
    total_steps: int


class _Curves(Protocol):
    def scalar(self, name: str, value: float, step: int) -> None: ...


@contextmanager
def watched_layers(model: nn.Module, course: _Course, curves: _Curves) -> Iterator[None]:
    """Inside the context about ``POINTS`` evenly spaced training steps are looked at, the first among them.

    Of each, the first forward counts (the first micro-batch). Which steps those are depends on the step alone, so that
    a run that was interrupted and goes on has the same curves.

    Args:
        model: razored; of a plain network there is nothing to see.
        course: the trainer.
        curves: takes ``sparsity/<layer>`` and ``kept_energy/<layer>``.
    """
    every = -(-course.total_steps // POINTS)
    open_contexts = ExitStack()
    seen: set[int] = set()

    def before(module: nn.Module, _arguments: object) -> None:
        step = course.step
        wanted = step % every == 0 and step < course.total_steps and step not in seen
        if wanted and module.training and torch.is_grad_enabled():
            seen.add(step)
            energy = open_contexts.enter_context(br.kept_energy(module))
            open_contexts.callback(lambda: write(energy, step + 1))

    def after(*_: object) -> None:
        open_contexts.close()  # an exit stack can be filled anew

    def write(energy: Energy, step: int) -> None:
        for row in energy.rows:
            curves.scalar(f"sparsity/{row.module}", row.sparsity, step)
            curves.scalar(f"kept_energy/{row.module}", row.kept_energy, step)

    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(before).remove)
        hooks.callback(model.register_forward_hook(after, always_call=True).remove)
        yield
