"""From the ``model`` section of a configuration to a plain network."""

from __future__ import annotations

import difflib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from torch import nn

from razorlab.errors import UserError, one_line
from razorlab.models.weights import find_weights, load_weights
from razorlab.models.zoo import BACKBONES, BackboneSpec, DropRates, find_spec

if TYPE_CHECKING:
    from razorlab import schema


@dataclass(frozen=True)
class Backbone:
    """A network and what one has to know to use it.

    Args:
        model: (N, 3, S, S) float -> (N, classes) logits.
        head: name of the classifier inside ``model``.
        mean, std: normalisation of its input, for values in [0, 1].
        stages: names of the modules that checkpointing may wrap: the stages, and the blocks of each.
        weights: the file that the weights came from, None where they are random.
        one_size: whether it takes images of the size alone that it was built for.
        own_size: side of the images that it was made for, pixels; None where that is not known.
        vocabulary: how many tokens there are, for a network of texts (N, T); None for one of images.
    """

    model: nn.Module
    head: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    stages: dict[str, tuple[str, ...]]
    weights: Path | None
    one_size: bool = False
    own_size: int | None = None
    vocabulary: int | None = None


def build_backbone(
    config: schema.Model, num_classes: int, pretrain: str | Path, image_size: int | None = None
) -> Backbone:
    """Build the network that ``config["name"]`` names, with its weights and a new head of ``num_classes``.

    Args:
        config: the ``model`` section of a configuration.
        pretrain: folder of weights files.
        image_size: side of the input, pixels, for networks that are made for one size; None is the pretrained one's.

    Raises:
        UserError: unknown name, weights missing or unfit, or a network that is no classifier.
    """
    name = config["name"]
    spec = find_spec(name)
    if spec is None:
        close = difflib.get_close_matches(name, sorted({*BACKBONES, *timm.list_models()}), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise UserError.value("model.name", name, f"{'|'.join(BACKBONES)} or any name of timm.list_models(){hint}")
    file = find_weights(name, spec, config["weights"], Path(pretrain)) if config["pretrained"] else None
    drop_rates = DropRates.of(config)
    try:
        model = spec.build(num_classes, drop_rates, image_size)
        head = spec.head or _head_name(model)
    except (TypeError, ValueError, AssertionError, RuntimeError, AttributeError) as error:
        sized = spec.one_size and image_size is not None and not isinstance(error, AttributeError)
        own = f"; it is made for {spec.own_size} px, set data.image_size={spec.own_size}"
        raise UserError(
            f"model.name={name} cannot be built as a classifier with {drop_rates}"
            f"{f' for images of {image_size} px' if sized else ''}: {one_line(error) or type(error).__name__}"
            f"{own if sized and spec.own_size not in (None, image_size) else ''}"
        ) from error
    if file is not None:
        _load(model, file, head, spec)
    start_head(model.get_submodule(head), config["head_init"])
    return Backbone(model, head, spec.mean, spec.std, find_stages(model), file, spec.one_size, spec.own_size)


def start_head(head: nn.Module, how: str) -> None:
    """Initialise the new classifier's Linear layers.

    A network's own rule may be far off for a small number of classes: EfficientNet draws from +-1/sqrt(classes), which
    for ten classes starts the loss at 5 nats and throws a pretrained backbone with frozen batch norm off its weights.
    """
    for module in head.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()  # both uniform in +-1/sqrt(in_features)
            if how == "zero":
                nn.init.zeros_(module.weight)
            if how != "linear":
                nn.init.zeros_(module.bias)


def _load(model: nn.Module, file: Path, head: str, spec: BackboneSpec) -> None:
    if spec.load is None:
        load_weights(model, file, head)
        return
    try:
        spec.load(model, file)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{file} cannot be read as weights of this network ({error}): fetch it again") from error


def _head_name(model: Any) -> str:
    classifier = model.get_classifier()
    for name, module in model.named_modules():
        if module is classifier:
            return name
    raise AttributeError("its classifier is not a module of it")


def find_stages(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the names of the network's stages and of the blocks in each.

    For the layouts that timm's networks follow: ``layer1`` to ``layer4`` (ResNet), or ``blocks``, ``stages`` or
    ``layers`` that hold stages of blocks (EfficientNet, ConvNeXt, Swin) or blocks alone (transformers, where every
    block is a stage of its own, since all run at one resolution). Empty where the layout is another.
    """
    if all(hasattr(model, f"layer{i}") for i in range(1, 5)):
        stages = {f"layer{i}": getattr(model, f"layer{i}") for i in range(1, 5)}
        return {name: _children(stage, name) for name, stage in stages.items()}
    for attribute in ("blocks", "stages", "layers"):
        container = getattr(model, attribute, None)
        if isinstance(container, nn.Sequential | nn.ModuleList) and len(container):
            return {f"{attribute}.{n}": _blocks(child, f"{attribute}.{n}") for n, child in container.named_children()}
    return {}


def _children(module: nn.Module, prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name, _ in module.named_children())


def _blocks(stage: nn.Module, name: str) -> tuple[str, ...]:
    if isinstance(stage, nn.Sequential):
        return _children(stage, name)
    blocks = getattr(stage, "blocks", None)
    if isinstance(blocks, nn.Sequential):
        return _children(blocks, f"{name}.blocks")
    return (name,)
