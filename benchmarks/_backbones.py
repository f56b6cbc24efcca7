"""Backbones with batch norm as a fixed scale and shift, as the benchmarks of gradients and bytes compare them."""

from __future__ import annotations

from pathlib import Path

from razorlab.models.build import Backbone, build_backbone
from razorlab.training.methods import apply_method, set_train_mode

ROOT = Path(__file__).parents[1]
CLASSES = 10
FROZEN = {"name": "full", "bn_affine": "frozen", "bn_stats": "frozen"}


def build(name: str, pretrained: bool) -> Backbone:
    """The backbone called ``name``, or timm's network, with a new head."""
    config = {"name": name, "weights": None, "pretrained": pretrained, "drop_rate": 0.0, "head_init": "linear"}
    return build_backbone(config, CLASSES, ROOT / "pretrain")


def freeze(backbone: Backbone) -> None:
    """Train all of the network but batch norm."""
    set_train_mode(backbone.model, apply_method(backbone.model, backbone.head, FROZEN))
