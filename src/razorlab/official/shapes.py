"""A forward for its shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.func import functional_call


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, each one's own mode put back after: a forward must not move running statistics."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def forward_shapes(model: nn.Module, input_size: tuple[int, ...]) -> None:
    """One sample's forward on the meta device: hooks see shapes, nothing is allocated or computed."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    with torch.no_grad(), _eval_mode(model):
        functional_call(model, meta, (torch.empty(1, *input_size, device="meta"),))
