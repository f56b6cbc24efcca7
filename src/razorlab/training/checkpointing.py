"""Gradient checkpointing around a network's blocks or stages (Chen et al. 2016, arXiv 1604.06174).

``selective`` keeps the outputs of a block's products, which are what is slow to compute again, and recomputes the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from razorlab.errors import UserError

_ATEN = torch.ops.aten
PRODUCTS = [  # whose outputs selective checkpointing keeps
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
    _ATEN.convolution.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
]


@dataclass(frozen=True)
class _Checkpointed:
    """Stands in for the ``forward`` of ``module``; a class at module level so that the network stays picklable."""

    module: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def forward(*inputs: Any) -> Any:
            return type(self.module).forward(self.module, *inputs, **kwargs)

        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=self._contexts, **self._options())

    def _contexts(self) -> tuple[Any, Any]:
        return contextlib.nullcontext(), _statistics_held(self.module)

    def _options(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class _Selective(_Checkpointed):
    """The same, but for the outputs of ``PRODUCTS``; ``kept`` is where those of the latest forward lie."""

    kept: set[int] = field(default_factory=set)

    def _contexts(self) -> tuple[Any, Any]:
        self.kept.clear()
        keeping, handing_out = create_selective_checkpoint_contexts(self._policy)
        return keeping, self._recomputation(handing_out)

    def _options(self) -> dict[str, Any]:
        return {"respect_saved_tensors_hooks": True}  # whoever counts saved tensors is to see the products' outputs

    def _policy(self, context: SelectiveCheckpointContext, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if operator not in PRODUCTS:
            return CheckpointPolicy.PREFER_RECOMPUTE
        output = context.op_output
        first = output if isinstance(output, Tensor) else output[0]  # attention returns its statistics, too
        self.kept.add(first.untyped_storage().data_ptr())
        return CheckpointPolicy.MUST_SAVE

    @contextlib.contextmanager
    def _recomputation(self, handing_out: AbstractContextManager[Any]) -> Iterator[None]:
        """The operators of a forward and of its repetition are counted off against each other: those that hold the
        statistics are in one of them only, and have to stay outside."""
        self.kept.clear()
        with _statistics_held(self.module), handing_out:
            yield


@dataclass(frozen=True)
class _Guard:
    """Before a module that works in place: from where it meets an output that is kept, it no longer does."""

    kept: set[int]

    def __call__(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        if self.kept and inputs and inputs[0].untyped_storage().data_ptr() in self.kept:
            module.inplace = False


def _guard(block: nn.Module, kept: set[int]) -> None:
    for child in block.modules():
        if getattr(child, "inplace", False):
            child.register_forward_pre_hook(_Guard(kept))


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
        granularity: ``none``, ``block``, ``stage``, or ``selective``: by block, but for the outputs of ``PRODUCTS``.

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
        if granularity == "selective":
            module.forward = selective = _Selective(module)
            _guard(module, selective.kept)
        else:
            module.forward = _Checkpointed(module)
    return names
