"""DeepLabV3 (Chen et al. 2017, arXiv 1706.05587): torchvision's head on a convolutional backbone of this laboratory.

Shape legend: N images, S side of the input, pixels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from razorlab.errors import UserError, one_line
from razorlab.models.build import Backbone, build_backbone, find_stages

if TYPE_CHECKING:
    from razorlab import schema

# of the dilated convolutions, by output stride
RATES: dict[int | None, tuple[int, int, int]] = {8: (12, 24, 36), 16: (6, 12, 18), 32: (3, 6, 9)}


class DeepLabV3(nn.Module):
    """``backbone`` gives a list of one feature map; ``classifier`` scores its positions.

    Where ``coarse`` is set, training gets the scores as they are, for a loss that stretches them by itself.
    """

    coarse = False

    def __init__(self, backbone: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.backbone, self.classifier = backbone, classifier

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, S, S) -> logits (N, classes, S, S), or (N, classes, s, s) as the classifier gives them."""
        (features,) = self.backbone(x)
        scores = self.classifier(features)
        return scores if self.coarse and self.training else stretched(scores, x.shape[-2:])


def stretched(scores: Tensor, size: tuple[int, ...]) -> Tensor:
    """Scores (N, classes, s, s) brought to the sides of their image."""
    return F.interpolate(scores, size, mode="bilinear", align_corners=False)


def build_segmenter(config: schema.Model, num_classes: int, pretrain: str | Path, task: schema.Task) -> Backbone:
    """Build DeepLabV3 on the backbone that ``config["name"]`` names, with its weights and a new head.

    The last stages are dilated until ``task["output_stride"]`` input pixels are one position.

    Args:
        config: the ``model`` section of a configuration; ``drop_rate`` and ``head_init`` are the classifier's and have
            no meaning here: torchvision's head has its own.
        pretrain: folder of weights files.
        task: that section of the configuration.

    Raises:
        UserError: as ``build_backbone``; or the network has no map of features that could be scored.
    """
    name, output_stride, momentum = config["name"], task["output_stride"], task["bn_momentum"]
    whole = build_backbone(config, 1, pretrain)
    architecture = getattr(whole.model, "pretrained_cfg", {}).get("architecture")
    try:
        if architecture is None:
            raise ValueError("it is none of timm's")
        features: Any = timm.create_model(
            architecture, features_only=True, out_indices=(-1,), output_stride=output_stride
        )
        weights = whole.model.state_dict()
        features.load_state_dict({key: weights[key] for key in features.state_dict()})
    except (RuntimeError, TypeError, KeyError, ValueError, AttributeError, NotImplementedError) as error:
        raise UserError(
            f"model={name} task=segmentation task.output_stride={output_stride} is not possible ({one_line(error)}): "
            "choose mobilenetv2, resnet50 or another convolutional network of timm"
        ) from error
    for module in features.modules():
        if isinstance(module, _BatchNorm) and momentum is not None:
            module.momentum = momentum
    head = DeepLabHead(features.feature_info.channels()[-1], num_classes, RATES[output_stride])
    stages = {
        f"backbone.{stage}": tuple(f"backbone.{block}" for block in blocks)
        for stage, blocks in find_stages(features).items()
    }
    return replace(whole, model=DeepLabV3(features, head), head="classifier", stages=stages, one_size=False)
