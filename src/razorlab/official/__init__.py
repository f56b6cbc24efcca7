"""The memory figure that the paper's released code prints: a formula over layer shapes, kept for comparison only.

``official_formula`` takes a plain network and a sparsity; ``official_memory`` takes the network that trains, razored or
not. What the library measures and predicts is in ``backrazor.memory``.
"""

from __future__ import annotations

import copy

from torch import nn

import backrazor as br
from razorlab.official.formula import OfficialMemory, OfficialRow, official_formula

__all__ = ["OfficialMemory", "OfficialRow", "official_formula", "official_memory"]


def official_memory(model: nn.Module, input_size: tuple[int, ...], batch_size: int) -> OfficialMemory:
    """Return what the formula says of ``model``, razored or not, which stays as it is.

    A razored network is asked at the sparsity of its first and of its last Linear or Conv2d layer that is razored (body
    and head). The formula reads shapes: no activation is allocated, and weights are shared.

    Args:
        input_size: one sample's shape without the batch axis, such as (3, 224, 224).

    Raises:
        ValueError: the formula does not cover this kind of network.
    """
    kinds = (nn.Linear, nn.Conv2d)
    rules = [module.razor for module in model.modules() if isinstance(module, kinds) and hasattr(module, "razor")]
    if not rules:
        return official_formula(model, input_size, batch_size)
    plain = copy.deepcopy(model, memo={id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    br.unrazor_(plain)
    body, head = rules[0].pruned.sparsity, rules[-1].pruned.sparsity
    return official_formula(plain, input_size, batch_size, sparsity=body, head_sparsity=head)
