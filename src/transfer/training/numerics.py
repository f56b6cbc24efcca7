"""Bad numbers: whether a step has any, and where they came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

import backrazor as br
from transfer.training.network import Network


def bad_step(network: Network, loss: float, forwards: Callable[[], Iterable[object]]) -> str | None:
    """Say what is not finite after a backward, None where all is.

    Args:
        loss: of this process's share of the batch.
        forwards: runs the step's forwards once more, one an item, to look for the layer.
    """
    found = None
    if network.razored:
        try:
            br.check_finite(network.model)  # asked in any case: it clears the flags
        except FloatingPointError as error:
            found = str(error)
    if not math.isfinite(loss):
        return f"the loss is {loss}, {first_bad_layer(network.model, forwards) or found or 'though no layer is bad'}"
    if found:
        return found
    gradients = {name: p.grad for name, p in network.model.named_parameters() if p.grad is not None}
    names = bad_tensors(gradients.items())
    # Backward runs from the last layer to the first, and what it meets is passed on: the last one is the first.
    return f"the gradient of {names[-1]} is not finite, one of {len(names)}" if names else None


def bad_tensors(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the tensors that hold NaN or Inf. One device read where none does."""
    named = dict(tensors)
    if not named or math.isfinite(float(torch.nn.utils.get_total_norm(named.values()))):
        return []
    return [name for name, tensor in named.items() if not bool(tensor.isfinite().all())]


@torch.no_grad()
def first_bad_layer(model: nn.Module, forwards: Callable[[], Iterable[object]]) -> str | None:
    """Run ``forwards`` and say which layer is the first with NaN or Inf in its output."""
    found: list[str] = []

    def look(name: str, module: nn.Module, output: object) -> None:
        if not found and isinstance(output, Tensor) and not bool(output.isfinite().all()):
            weights = bad_tensors(module.named_parameters(recurse=False))
            found.append(f"first in the output of {name}" + (f", whose {weights[0]} is not finite" if weights else ""))

    hooks = [
        module.register_forward_hook(lambda module, _, output, name=name: look(name, module, output))
        for name, module in model.named_modules()
        if name and not any(module.children())
    ]
    try:
        for _ in forwards():
            if found:
                break
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


class HeldStatistics:
    """The running statistics of batch norms before a step, to be put back where the step is skipped."""

    def __init__(self, model: nn.Module) -> None:
        self.held = [(buffer, buffer.clone()) for buffer in _statistics(model)]

    def restore(self) -> None:
        """Put them back, in place."""
        for buffer, before in self.held:
            buffer.copy_(before)


def _statistics(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if module.training and getattr(module, "track_running_stats", False):
            buffers = (module.running_mean, module.running_var, module.num_batches_tracked)
            yield from (buffer for buffer in buffers if buffer is not None)
