"""What a training step costs: the memory columns and the step time of a record.

predicted: by formula, without a step. saved: bytes that autograd holds after a forward. peak: highest allocation during
a step above what is resident, in a fresh process. Bytes; seconds.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import backrazor as br
from razorlab import schema
from razorlab.models.frozen_storage import coded_weights
from razorlab.official import official_memory
from razorlab.records import side_of, task_of
from razorlab.training.evaluation import training_loss
from razorlab.training.network import AUTOCAST, Network, assemble, autocast
from razorlab.training.optimisation import make_optimizer

PARTS = ("weight_bytes", "gradient_bytes", "optimizer_bytes")  # what a step holds beside its peak


def build_step(
    config: schema.Config,
    num_classes: int,
    batch_size: int,
    image_size: int,
    prepare: Callable[[nn.Module, torch.device], None] | None = None,
    saving: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> br.memory.Step:
    """Build the training step of a configuration from plain values, in whatever process it is called, on random inputs.

    Args:
        config: a validated configuration.
        num_classes: size of the head.
        batch_size: images in the step, which come in micro-batches where the configuration says so.
        image_size: side of its input, pixels; of texts their tokens.
        prepare: called with the plain network and the step's device, before anything is done to the network.
        saving: the context in which each forward runs.
    """
    settings = config["trainer"]
    if settings["threads"] is not None:
        torch.set_num_threads(settings["threads"])
    device = pick_device(settings["device"])
    torch.manual_seed(config["seed"])
    first_of_all = None if prepare is None else lambda model: prepare(model, device)
    network = assemble({**config, "data": {**config["data"], "image_size": image_size}}, num_classes, first_of_all)
    network.model.to(device)
    images = example_inputs(network, batch_size, image_size).to(device)
    if network.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    model: Any = torch.compile(network.model) if settings.get("compile", False) else network.model
    labels = torch.randint(num_classes, label_shape(config, batch_size, image_size)).to(device)

    micro = settings["micro_batch"] or batch_size
    *first, last = zip(images.split(micro), labels.split(micro), strict=True)

    def part(x: Tensor, y: Tensor) -> Tensor:
        with saving():
            return step_loss(model, config, x, y) * (len(y) / batch_size)

    def forward() -> Tensor:
        for x, y in first:  # all micro-batches but the last have their backward here
            part(x, y).backward()
        return part(*last)

    fused = settings.get("cuda_graph", False)
    optimizer = make_optimizer(network.model, network.backbone.head, config["optim"], fused)
    if settings.get("release_gradients", False):
        br.memory.GradientRelease(optimizer)
    return br.memory.Step(network.model, forward, optimizer)


def example_inputs(network: Network, batch: int, size: int) -> Tensor:
    """Random inputs as the network takes them: images (batch, 3, size, size), or the token numbers of texts (batch,
    size). The first text is a token short, as one of a batch is: attention then has its mask."""
    if network.backbone.vocabulary is None:
        return torch.randn(batch, 3, size, size)
    ids = torch.randint(1, network.backbone.vocabulary, (batch, size))
    model: Any = network.model
    ids[0, -1] = model.pad
    return ids


def label_shape(config: schema.Config, batch: int, size: int) -> tuple[int, ...]:
    """The shape of the labels of ``batch`` images of side ``size``: one per image, or one per pixel."""
    return (batch, size, size) if task_of(config) == "segmentation" else (batch,)


def pick_device(name: str) -> torch.device:
    """Return the device that ``trainer.device`` names; ``auto`` is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def gpu_circumstances(device: str) -> dict[str, Any]:
    """Return what a figure taken on a CUDA device depends on: GPU, driver, CUDA, cuDNN; empty for the CPU."""
    if not device.startswith("cuda"):
        return {}
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def driver_version() -> str | None:
    """The version of the NVIDIA driver, as its own tool says; None without that tool."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.split("\n")[0].strip() or None


def step_loss(model: nn.Module, config: schema.Config, images: Tensor, labels: Tensor) -> Tensor:
    """The training loss of normalised ``images``, as the loop computes it."""
    with autocast(images.device, config["trainer"]["precision"]):
        logits = model(images)
    return training_loss(logits, labels, config["optim"]["label_smoothing"])


def step_shape(config: schema.Config) -> tuple[int, int]:
    """Return images and image side (of texts, tokens) of the optimizer step that the memory columns describe."""
    measure, trainer = config["trainer"]["measure"], config["trainer"]
    return measure["batch_size"] or trainer["batch_size"], measure["image_size"] or side_of(config)


def saved_columns(network: Network, config: schema.Config, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return the columns that this process can tell, for one forward of real training images (uint8).

    ``predicted_bytes`` is None under checkpointing, which the formula leaves out; ``official_bytes`` is None where the
    released code's formula has no rule for the network. The predicted peak is that of the step with its optimizer; the
    columns of its other parts are replaced where a step is measured.
    """
    batch, size = step_shape(config)
    forward = min(batch, config["trainer"]["micro_batch"] or batch)
    # Clones: autograd would hold the whole storage of a slice, which a training step does not have.
    images = images.repeat(-(-forward // len(images)), *(1 for _ in images.shape[1:]))[:forward].clone()
    labels = labels.repeat(-(-forward // len(labels)), *(1 for _ in labels.shape[1:]))[:forward].clone()
    x = network.normalise(images)
    if x.dim() == 4 and x.shape[-1] != size:
        x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
    network.train()
    with br.memory.ledger(network.model) as ledger:
        loss = step_loss(network.model, config, x, labels)
    del loss
    columns = {
        "batch_size": batch,
        "forward_images": forward,
        "image_size": size,
        "weight_bytes": br.memory.weight_bytes(network.model),
        "saved_bytes": ledger.total_bytes,
        "saved_by_role": ledger.by_role(),
        "saved_by_layer": ledger.by_module(),
        "predicted_bytes": None,
        "official_bytes": None,
    }
    if config["trainer"]["checkpointing"] == "none":
        shape: dict[str, Any] = {"input_size": tuple(x.shape[1:]), "batch_size": forward}
        labels = torch.zeros(label_shape(config, forward, size), dtype=torch.long, device=images.device)
        kind = AUTOCAST[config["trainer"]["precision"]]
        predicted = br.memory.predict(
            network.model,
            loss_fn=lambda logits: training_loss(logits, labels, config["optim"]["label_smoothing"]),
            autocast=kind,
            optimizer=make_optimizer(network.model, network.backbone.head, config["optim"]),
            release_gradients=config["trainer"].get("release_gradients", False),
            **shape,
        )
        columns |= {"predicted_bytes": predicted.saved_bytes, "predicted_peak_bytes": predicted.peak_bytes}
        columns |= {name: getattr(predicted, name) for name in ("gradient_bytes", "optimizer_bytes")}
        columns["predicted_total_bytes"] = predicted.total_bytes
        columns["official_bytes"] = _official(network, shape) if task_of(config) == "classification" else None
    return columns


def _official(network: Network, shape: Mapping[str, Any]) -> int | None:
    try:
        total = round(official_memory(network.model, **shape).total_bytes)
    except ValueError:
        return None
    return total + coded_weights(network.model)  # codes are no parameters, but the formula counts a byte for each


def measured_columns(result: Any, rows: int) -> dict[str, Any]:
    """Return the columns of one ``br.memory.measure_step`` result, of peak and time what was measured.

    ``rows`` is how many were measured in turn.
    """
    columns: dict[str, Any] = {}
    if result.peak_samples:
        names: tuple[str, ...] = ("peak_bytes", "process_peak_bytes", "peak_samples", *PARTS, "total_bytes")
        names += ("above_bare_bytes",) if result.bare_samples else ()
        names += ("reserved_bytes",) if result.reserved_samples else ()
        columns |= {name: getattr(result, name) for name in names}
    if result.time_samples:
        names = ("step_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds", "time_samples")
        columns |= {name: getattr(result, name) for name in names} | {"interleaved_rows": rows}
    return columns
