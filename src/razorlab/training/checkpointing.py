"""Gradient checkpointing around a network's blocks or stages (Chen et al. 2016, arXiv 1604.06174)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from razorlab.errors import UserError


@dataclass(frozen=True)
class _Checkpointed:
    """Stands in for the ``forward`` of ``module``; a class at module level so that the network stays picklable."""

    module: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def forward(*inputs: Any) -> Any:
            return type(self.module).forward(self.module, *inputs, **kwargs)

        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[Any, Any]:
        return contextlib.nullcontext(), _statistics_held(self.module)


@contextlib.contextmanager
def _statistics_held(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norms as they are: the first forward has updated them already."""
    norms = [child for child in module.modules() if getattr(child, "track_running_stats", False) and child.training]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)


def apply_checkpointing(model: nn.Module, stages: Mapping[str, tuple[str, ...]], granularity: str) -> tuple[str, ...]:
    """Recompute the inside of every block or stage of ``model`` during backward, in place.

    Names and parameters stay as they are; evaluation is untouched. Dropout draws the same mask again.

    Args:
        stages: ``Backbone.stages``.
        granularity: ``none``, ``block`` or ``stage``.

    Returns:
        Names of the modules whose inside is recomputed.

    Raises:
        UserError: the network's blocks are not known.
    """
    if granularity == "none":
        return ()
    if not stages:
        raise UserError(
            f"trainer.checkpointing={granularity} is not possible for {type(model).__name__}: its blocks are "
            "not known; choose trainer.checkpointing=none or another model"
        )
    names = tuple(stages) if granularity == "stage" else tuple(name for blocks in stages.values() for name in blocks)
    for name in names:
        module = model.get_submodule(name)
        module.forward = _Checkpointed(module)
    return names
