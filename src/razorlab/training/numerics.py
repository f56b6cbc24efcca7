"""Bad numbers: whether a step has any, and where they came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

import backrazor as br
from backrazor.convert import status_of
from razorlab.training.network import Network


def bad_activation(network: Network) -> str | None:
    """Say what the razored layers saw that is not finite, None for nothing; clears their flags. One device read."""
    if not network.razored:
        return None
    try:
        br.check_finite(network.model)
    except FloatingPointError as error:
        return str(error)
    return None


def activation_is_bad(network: Network) -> Tensor | None:
    """Whether ``bad_activation`` has something to say: () bool, on the device, without a read. None where nothing
    packs."""
    status = status_of(network.model) if network.razored else None
    return None if status is None else status != 0


def gradient_is_bad(model: nn.Module) -> Tensor:
    """Whether a gradient holds NaN or Inf: () bool, on the device, without a read."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return ~torch.nn.utils.get_total_norm(gradients).isfinite()


def bad_step(
    network: Network,
    loss: float,
    found: str | None,
    forwards: Callable[[], Iterable[object]],
    gradients: list[str] | None = None,
) -> str | None:
    """Say what is not finite after a backward, None where all is. Reads the device many times.

    Args:
        loss: of this process's share of the batch.
        found: as ``bad_activation`` says.
        forwards: runs the step's forwards once more, one per item, to look for the layer.
        gradients: the parameters with bad ones, where they are gone; None looks at those that lie there.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}, {first_bad_layer(network.model, forwards) or found or 'though no layer is bad'}"
    if found:
        return found
    names = gradients
    if names is None:
        names = bad_tensors((name, p.grad) for name, p in network.model.named_parameters() if p.grad is not None)
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
