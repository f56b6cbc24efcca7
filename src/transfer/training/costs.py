"""What a training step costs: the memory columns and the step time of a record.

predicted: by formula, without a step. saved: bytes that autograd holds after a forward. peak: highest allocation during
a step above what is resident, in a fresh process. Bytes; seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import backrazor as br
from transfer.models.frozen_storage import coded_weights
from transfer.training.network import Network, assemble
from transfer.training.optimisation import make_optimizer


@dataclass(frozen=True)
class StepFactory:
    """Builds the training step of a configuration again, from plain values, in whatever process it is called.

    Args:
        config: the validated configuration.
        num_classes: size of the head.
        batch_size: images in the step.
        image_size: side of its input, pixels.
    """

    config: Mapping[str, Any]
    num_classes: int
    batch_size: int
    image_size: int

    def __call__(self) -> br.memory.Step:
        settings = self.config["trainer"]
        if settings["threads"] is not None:
            torch.set_num_threads(settings["threads"])
        device = pick_device(settings["device"])
        torch.manual_seed(self.config["seed"])
        network = assemble(self.config, self.num_classes)
        network.model.to(device)
        images = torch.randn(self.batch_size, 3, self.image_size, self.image_size).to(device)
        labels = torch.randint(self.num_classes, (self.batch_size,)).to(device)

        def forward() -> Tensor:
            return step_loss(network, self.config, images, labels)

        return br.memory.Step(
            network.model, forward, make_optimizer(network.model, network.backbone.head, self.config["optim"])
        )


def pick_device(name: str) -> torch.device:
    """Return the device that ``trainer.device`` names; ``auto`` is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def weight_bytes(network: Network) -> int:
    """Bytes that parameters and buffers of the network take, frozen ones as they are stored."""
    tensors = (*network.model.parameters(), *network.model.buffers())
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def step_loss(network: Network, config: Mapping[str, Any], images: Tensor, labels: Tensor) -> Tensor:
    """The training loss of normalised ``images``, as the loop computes it."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config["trainer"]["precision"] == "bfloat16"):
        logits = network.model(images)
    return _criterion(logits, labels, config)


def step_shape(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return batch size and image side of the step that the memory columns describe."""
    measure, trainer = config["trainer"]["measure"], config["trainer"]
    batch = measure["batch_size"] or trainer["micro_batch"] or trainer["batch_size"]
    return batch, measure["image_size"] or config["data"]["image_size"]


def saved_columns(network: Network, config: Mapping[str, Any], images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return the columns that this process can tell, for one batch of real training images (uint8).

    ``predicted_bytes`` is None under checkpointing, which the formula leaves out; ``official_bytes`` is None where the
    released code's formula has no rule for the network.
    """
    batch, size = step_shape(config)
    # Clones: autograd would hold the whole storage of a slice, which a training step does not have.
    images = images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch].clone()
    labels = labels.repeat(-(-batch // len(labels)))[:batch].clone()
    x = network.normalise(images)
    if x.shape[-1] != size:
        x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
    network.train()
    with br.memory.ledger(network.model) as ledger:
        loss = step_loss(network, config, x, labels)
    del loss
    columns = {
        "batch_size": batch,
        "image_size": size,
        "weight_bytes": weight_bytes(network),
        "saved_bytes": ledger.total_bytes,
        "saved_by_role": ledger.by_role(),
        "saved_by_layer": ledger.by_module(),
        "predicted_bytes": None,
        "official_bytes": None,
    }
    if config["trainer"]["checkpointing"] == "none":
        shape = {"input_size": (3, size, size), "batch_size": batch}
        labels = torch.zeros(batch, dtype=torch.long, device=images.device)
        autocast = torch.bfloat16 if config["trainer"]["precision"] == "bfloat16" else None
        predicted = br.memory.predict(
            network.model, loss_fn=lambda logits: _criterion(logits, labels, config), autocast=autocast, **shape
        )
        columns |= {"predicted_bytes": predicted.saved_bytes, "predicted_peak_bytes": predicted.peak_bytes}
        columns["official_bytes"] = _official(network, shape)
    return columns


def _criterion(logits: Tensor, labels: Tensor, config: Mapping[str, Any]) -> Tensor:
    return F.cross_entropy(logits.float(), labels, label_smoothing=config["optim"]["label_smoothing"])


def _official(network: Network, shape: Mapping[str, Any]) -> int | None:
    try:
        total = br.memory.predict(network.model, rule="official", **shape).peak_bytes
    except ValueError:
        return None
    return total + coded_weights(network.model)  # codes are no parameters, but the formula counts a byte for each


def measured_columns(result: Any, rows: int) -> dict[str, Any]:
    """Return the columns of one ``br.memory.measure_step`` result; ``rows`` is how many were measured in turn."""
    return {
        "peak_bytes": result.peak_bytes,
        "process_peak_bytes": result.process_peak_bytes,
        "step_seconds": result.step_seconds,
        "forward_seconds": result.forward_seconds,
        "backward_seconds": result.backward_seconds,
        "optimizer_seconds": result.optimizer_seconds,
        "peak_samples": list(result.peak_samples),
        "time_samples": list(result.time_samples),
        "interleaved_rows": rows,
    }
