"""The network that trains: backbone, method, razor and checkpointing put together from a configuration.

``assemble`` takes plain values only, so that a fresh process can build the same network again to measure it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import backrazor as br
from razorlab import schema
from razorlab.errors import UserError
from razorlab.keys import RAZOR_OVERRIDES
from razorlab.models import Backbone, build_backbone, build_segmenter, build_text_classifier
from razorlab.models.deeplab import DeepLabV3
from razorlab.models.frozen_storage import store_frozen_at_8_bits
from razorlab.models.text import insert_lora
from razorlab.models.tinytl import insert_lite_residuals
from razorlab.records import task_of
from razorlab.training.ablation import ablate
from razorlab.training.checkpointing import apply_checkpointing
from razorlab.training.methods import apply_method, set_train_mode

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}  # by trainer.precision


@dataclass(frozen=True)
class Network:
    """A network ready to train.

    Args:
        backbone: the network and its description; ``backbone.model`` is what trains.
        frozen_batch_norms: names of batch norms that stay in evaluation mode.
        razored: whether ``razor_`` was applied.
        report: what ``razor_`` replaced and left, as text; empty for the plain network.
        channels_last: whether images are handed to it in that memory format.
        pixel_classes: how many, where every pixel has one; None for one class per image.
    """

    backbone: Backbone
    frozen_batch_norms: tuple[str, ...]
    razored: bool
    report: str
    channels_last: bool = False
    pixel_classes: int | None = None

    @property
    def model(self) -> nn.Module:
        return self.backbone.model

    def train(self) -> None:
        """Training mode, frozen batch norms left out."""
        set_train_mode(self.model, self.frozen_batch_norms)

    def normalise(self, images: Tensor) -> Tensor:
        """Bring uint8 images (N, 3, S, S) to the float32 input that the backbone expects; token numbers (N, T) stay."""
        if images.dim() == 2:
            return images
        mean, std = _constants(self.backbone.mean, self.backbone.std, images.device)
        x = (images.float() / 255).sub_(mean).div_(std)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


@functools.lru_cache(maxsize=8)
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation as (1, 3, 1, 1) on ``device``, made once: each making is a copy that waits for the device."""
    shape = 1, 3, 1, 1
    return torch.tensor(mean, device=device).view(shape), torch.tensor(std, device=device).view(shape)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward in ``trainer.precision``."""
    dtype = AUTOCAST[precision]
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def razor_config(razor: schema.Razor) -> br.RazorConfig | None:
    """Return the library's configuration for the ``razor`` section; None for ``razor=none``.

    Raises:
        UserError: the library refuses a value.
    """
    if razor["name"] == "none":
        return None
    try:
        if razor["name"] == "int8":
            config = br.RazorConfig.int8()
        else:
            config = getattr(br.RazorConfig, razor["name"])(razor["sparsity"])
        given: Mapping[str, Any] = razor  # with the library's words; a record may be older than some
        chosen = {key: given[key] for key in RAZOR_OVERRIDES if given.get(key) is not None}
        return dataclasses.replace(config, **chosen)
    except ValueError as error:
        raise UserError(f"razor={razor['name']}: {error}") from error


def razor_network(model: nn.Module, razor: br.RazorConfig, patterns: str | None) -> str:
    """Razor every layer but those that ``patterns``, separated by commas, name; returns what was done, as text.

    A segmenter then hands its scores to a loss that makes no map of them.

    Raises:
        ValueError: as ``razor_``.
    """
    rules = {pattern.strip(): None for pattern in patterns.split(",")} | {"*": razor} if patterns else razor
    report = br.razor_(model, rules).table()
    if isinstance(model, DeepLabV3):
        model.coarse = True
    return report


def assemble(config: schema.Config, num_classes: int, prepare: Callable[[nn.Module], None] | None = None) -> Network:
    """Build the network of ``config`` (a validated configuration as plain values), on the CPU.

    Args:
        prepare: called with the plain backbone.

    Raises:
        UserError: as ``build_backbone``, ``insert_lite_residuals``, ``apply_checkpointing`` and
            ``razor_config``.
    """
    size = config["data"]["image_size"]
    pretrain, task = config["paths"]["pretrain"], task_of(config)
    if task == "segmentation":
        backbone = build_segmenter(config["model"], num_classes, pretrain, config["task"])
    elif task == "text":
        backbone = build_text_classifier(config["model"], num_classes)
    else:
        backbone = build_backbone(config["model"], num_classes, pretrain, size)
    if prepare is not None:
        prepare(backbone.model)
    measured = config["trainer"]["measure"]["image_size"]
    if backbone.one_size and measured not in (None, size):
        raise UserError(
            f"trainer.measure.image_size={measured} is not possible for model={config['model']['name']}, which takes "
            f"images of one size: leave it null, or set data.image_size={measured}, too"
        )
    method = config["method"]
    if method["name"].startswith("tinytl"):
        insert_lite_residuals(backbone.model)
    if method["name"] == "lora":
        insert_lora(backbone.model, backbone.head)
    frozen = apply_method(backbone.model, backbone.head, method)
    if method["frozen_bits"] is not None:
        store_frozen_at_8_bits(backbone.model)
    razor = razor_config(config["razor"])
    report = ""
    if razor is not None:
        try:
            report = razor_network(backbone.model, razor, config["razor"].get("dense"))
        except ValueError as error:
            raise UserError(f"razor={config['razor']['name']} model={config['model']['name']}: {error}") from error
        report += ablate(backbone.model, config["razor"])
    apply_checkpointing(backbone.model, backbone.stages, config["trainer"]["checkpointing"])
    channels_last = config["trainer"].get("channels_last", False)  # a record may be older than the key
    if channels_last:
        backbone.model.to(memory_format=torch.channels_last)
    network = Network(
        backbone,
        frozen,
        razor is not None,
        report,
        channels_last,
        pixel_classes=num_classes if task == "segmentation" else None,
    )
    network.train()
    return network
