"""A step whose gradients are released: every parameter steps in backward (``trainer.release_gradients=true``).

Loss and packed activations are looked at before backward, so that bad ones leave the weights as they are. A bad
gradient is found when others have stepped: the run ends, and goes on from its last checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor

import backrazor as br
from razorlab import schema
from razorlab.errors import UserError
from razorlab.training.network import Network
from razorlab.training.numerics import activation_is_bad
from razorlab.training.optimisation import clip_each


class ReleasedGradients:
    """Steps parameters during backward, and remembers which gradients were bad.

    Args:
        network: what trains.
        optimizer: over its parameters.
        limit: ``optim.grad_clip_each``; None clips nothing.
    """

    def __init__(self, network: Network, optimizer: torch.optim.Optimizer, limit: float | None) -> None:
        self.network, self.limit = network, limit
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in network.model.named_parameters()}
        self.seen: list[tuple[str, Tensor]] = []  # of this step: name, and whether its gradient is not finite
        self.release = br.memory.GradientRelease(optimizer, self._before)

    def begin(self) -> None:
        """A new step starts."""
        self.seen = []

    def may_go_back(self, loss: Tensor) -> bool:
        """Whether loss and packed activations are good, so that backward may change weights. One read of the device."""
        bad = ~loss.isfinite()
        packed = activation_is_bad(self.network)
        return not bool(bad if packed is None else bad | packed)

    def gradient_is_bad(self) -> Tensor:
        """Whether a gradient of this step held NaN or Inf: () bool, on the device, without a read."""
        return torch.stack([flag for _, flag in self.seen]).any() if self.seen else torch.tensor(False)

    def bad_gradients(self) -> list[str]:
        """The names of the parameters whose gradients of this step were bad, in the order of the network."""
        bad = {name for name, flag in self.seen if bool(flag)}
        return [name for name in self.names.values() if name in bad]

    def _before(self, parameter: Tensor) -> None:
        norm = torch.linalg.vector_norm(parameter.grad)
        self.seen.append((self.names[parameter], ~norm.isfinite()))
        if self.limit is not None:
            clip_each([parameter], self.limit)


def check_release(config: schema.Config, processes: int) -> None:
    """Refuse ``trainer.release_gradients=true`` in a job of several processes.

    Raises:
        UserError: as said.
    """
    if config["trainer"]["release_gradients"] and processes > 1:
        raise UserError(
            f"trainer.release_gradients=true is not possible: {processes} processes share each batch, and average "
            "their gradients after each has added up its own; leave it out, or start one process"
        )
