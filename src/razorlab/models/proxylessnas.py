"""ProxylessNAS-Mobile (Cai, Zhu, Han; ICLR 2019), built by the `ofa` package from a committed architecture file.

`ofa.model_zoo` would download both architecture and weights even for an untrained network; this module never reaches
for the network. Weights: `proxylessnas/proxyless_mobile.pth` of github.com/han-cai/files, placed in pretrain/.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

ARCHITECTURE = Path(__file__).resolve().parents[3] / "configs" / "model" / "proxylessnas.json"
DROPOUT = 0.2


def proxylessnas(
    num_classes: int = 1000, pretrained_path: str | Path | None = None, dropout: float = DROPOUT
) -> nn.Module:
    """ProxylessNAS-Mobile for (B, 3, H, W) float images, returning (B, num_classes) logits.

    Args:
        num_classes: classes of the head. A head of another size than the checkpoint's starts from its initialisation.
        pretrained_path: the published checkpoint (its key is `state_dict`); None initialises at random.
        dropout: probability before the head.

    Raises:
        ValueError: num_classes below 1, or a checkpoint that is not of this network.
        FileNotFoundError: no file at pretrained_path.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes!r} must be at least 1")
    # Imported here: ofa takes three seconds to import, and needs gdown, which it does not declare.
    from ofa.imagenet_classification.networks import ProxylessNASNets

    architecture = json.loads(ARCHITECTURE.read_text())
    architecture["classifier"].update(out_features=num_classes, dropout_rate=dropout)
    network = ProxylessNASNets.build_from_config(architecture)
    if pretrained_path is not None:
        load_published_weights(network, Path(pretrained_path))
    return network


def load_published_weights(network: nn.Module, path: Path) -> None:
    """Load all of `path`, but for a head of another size. Every other tensor has to match by name and shape.

    Raises:
        FileNotFoundError, ValueError: as `proxylessnas`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"pretrained_path={path}: no such file")
    # The published file is older than ofa's name for the convolutional branch.
    state = {name.replace(".mobile_inverted_conv.", ".conv."): value for name, value in read_checkpoint(path).items()}
    own = network.state_dict()
    head = {name for name in own if name.startswith("classifier.")}
    if any(name in state and state[name].shape != own[name].shape for name in head):
        state = {name: tensor for name, tensor in state.items() if name not in head} | {
            name: own[name] for name in head
        }
    wrong = sorted(
        name
        for name in own.keys() | state.keys()
        if not name.endswith("num_batches_tracked")
        and (name not in own or name not in state or own[name].shape != state[name].shape)
    )
    if wrong:
        raise ValueError(
            f"pretrained_path={path}: not ProxylessNAS-Mobile, {len(wrong)} tensors differ, first {wrong[0]}"
        )
    # Not ofa's own load_state_dict, which keeps the initial value of any tensor that the file lacks, without a word.
    nn.Module.load_state_dict(network, own | state)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a released checkpoint by name.

    Raises:
        ValueError: it is laid out otherwise.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in state.items()):
        raise ValueError(f"{path.name} has no key 'state_dict' with named tensors")
    return state
