"""Optimizer and learning rate schedule: the ``optim`` section of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def make_optimizer(
    model: nn.Module, head: str, optim: Mapping[str, Any], fused: bool | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer over the parameters that train; the head has a group of its own.

    Args:
        fused: whether one kernel takes the step of many parameters; None is torch's choice. Only such a step takes a
            learning rate that lies on the device.
    """
    fused = fused or None
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rate, decay = optim["lr"], optim["weight_decay"]
    groups = [
        {"params": [p for name, p in trained if not name.startswith(f"{head}.")], "lr": rate},
        {"params": [p for name, p in trained if name.startswith(f"{head}.")], "lr": rate * optim["head_lr_multiplier"]},
    ]
    groups = [group for group in groups if group["params"]]
    if optim["name"] == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=optim["momentum"], weight_decay=decay, fused=fused)
    kind = torch.optim.AdamW if optim["name"] == "adamw" else torch.optim.Adam
    return kind(groups, lr=rate, weight_decay=decay, fused=fused)


class Schedule:
    """Learning rate as a function of the step alone: linear warm-up, then a cosine to 0 or a constant.

    Holds no state besides the optimizer's groups, so resuming needs only the step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, optim: Mapping[str, Any], steps: int) -> None:
        warmup = min(optim["warmup_steps"], steps - 1)
        self.optimizer = optimizer
        self.cosine = None
        if optim["schedule"] == "cosine":
            self.cosine = CosineLRScheduler(
                optimizer,
                t_initial=steps - warmup,
                warmup_t=warmup,
                warmup_lr_init=0.0,
                warmup_prefix=True,
                t_in_epochs=False,
            )
        else:
            self.constant = LambdaLR(optimizer, lambda step: min(1.0, step / warmup) if warmup else 1.0)

    def set(self, step: int) -> float:
        """Set the learning rates for ``step`` (from 0) and return the first group's."""
        if self.cosine is not None:
            self.cosine.step_update(step)
        else:
            for group, base, factor in zip(
                self.optimizer.param_groups, self.constant.base_lrs, self.constant.lr_lambdas, strict=True
            ):
                group["lr"] = base * factor(step)
        return self.optimizer.param_groups[0]["lr"]
