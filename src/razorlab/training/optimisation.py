"""Optimizer and learning rate schedule: the ``optim`` section of a configuration."""

from __future__ import annotations

import os
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from razorlab import schema
from razorlab.errors import UserError

POLY_POWER = 0.9


def make_optimizer(
    model: nn.Module, head: str, optim: schema.Optim, fused: bool | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer over the parameters that train; the head has a group of its own.

    Args:
        fused: whether one kernel takes the step of many parameters; None is torch's choice. Only such a step takes a
            learning rate that lies on the device.

    Raises:
        UserError: ``optim.state_bits=8`` without the library that it takes.
    """
    fused = fused or None
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rate, decay = optim["lr"], optim["weight_decay"]
    groups = [
        {"params": [p for name, p in trained if not name.startswith(f"{head}.")], "lr": rate},
        {"params": [p for name, p in trained if name.startswith(f"{head}.")], "lr": rate * optim["head_lr_multiplier"]},
    ]
    groups = [group for group in groups if group["params"]]
    if optim.get("state_bits") is not None:  # a record may be older than the key
        return _with_state_at_8_bits(groups, optim)
    if optim["name"] == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=optim["momentum"], weight_decay=decay, fused=fused)
    kind = torch.optim.AdamW if optim["name"] == "adamw" else torch.optim.Adam
    return kind(groups, lr=rate, weight_decay=decay, fused=fused)


def _with_state_at_8_bits(groups: list[dict[str, Any]], optim: schema.Optim) -> torch.optim.Optimizer:
    """bitsandbytes' optimizers: a byte and a shared scale for 256 values (Dettmers et al., arXiv 2110.02861).

    Parameters of fewer than 4,096 elements keep their state in float32.
    """
    try:
        eight = bitsandbytes_optimizers()
    except ImportError as error:
        raise UserError(
            "optim.state_bits=8 needs bitsandbytes, which is not installed: pip install 'backrazor[state8]', or leave "
            "optim.state_bits out"
        ) from error
    shared = {"lr": optim["lr"], "weight_decay": optim["weight_decay"]}
    if optim["name"] == "sgd":
        return eight.SGD8bit(groups, momentum=optim["momentum"], **shared)
    return (eight.AdamW8bit if optim["name"] == "adamw" else eight.Adam8bit)(groups, **shared)


def bitsandbytes_optimizers() -> ModuleType:
    """``bitsandbytes.optim``, imported without the compiler.

    Its import decorates functions with ``torch.compile``, none of which an optimizer of the CPU or of CUDA calls, and
    that alone loads 50 MB. PyTorch leaves such functions as they are while this variable is set, and asks it then only.

    Raises:
        ImportError: it is not installed.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        from bitsandbytes import optim
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before
    return optim


def clip_each(parameters: Iterable[Tensor], limit: float) -> None:
    """Scale each parameter's gradient down, in place, so that its own norm is at most ``limit``."""
    for parameter in parameters:
        torch.nn.utils.clip_grad_norm_(parameter, limit)


class Schedule:
    """Learning rate as a function of the step alone: linear warm-up, then a cosine, a line or a polynomial to 0, that
    of the power ``POLY_POWER`` (as DeepLab is trained), or a constant.

    A warm-up counts steps from one, as the released code does: the first step has a share of the rate and not none,
    the last of ``warmup_steps`` all of it, and the last step of the cosine none. Without one the first has all of it.

    Holds no state besides the optimizer's groups, so resuming needs only the step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, optim: schema.Optim, steps: int) -> None:
        warmup = min(optim["warmup_steps"], steps - 1)
        self.optimizer = optimizer
        self.ahead = 1 if warmup else 0
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
            power = {"constant": 0.0, "linear": 1.0, "poly": POLY_POWER}[optim["schedule"]]
            self.constant = LambdaLR(
                optimizer,
                lambda step: step / warmup if step < warmup else (1 - (step - warmup) / (steps - warmup)) ** power,
            )

    def set(self, step: int) -> float:
        """Set the learning rates for ``step`` (from 0) and return the first group's."""
        step += self.ahead
        if self.cosine is not None:
            self.cosine.step_update(step)
        else:
            for group, base, factor in zip(
                self.optimizer.param_groups, self.constant.base_lrs, self.constant.lr_lambdas, strict=True
            ):
                group["lr"] = base * factor(step)
        return self.optimizer.param_groups[0]["lr"]
