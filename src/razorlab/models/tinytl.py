"""Lite residual modules of TinyTL (Cai, Gan, Zhu, Han; NeurIPS 2020, arXiv 2007.11622).

The backbone stays frozen; beside the main path of every inverted residual block a small branch trains at a quarter of
the block's output positions:

    y = block(x) + upsample(norm(conv1x1(relu(norm(groupconv5x5(avgpool2(x)))))))

Group norm and weight standardisation take batch norm's place in it, since it trains at batch 8. Its last norm starts at
zero, so that a fresh branch leaves the pretrained network's function as it is.

``tinytl_network`` is the network that its authors released: ProxylessNAS-Mobile with such branches, pretrained together
on ImageNet, with group norm for batch norm and standardised weights throughout.

Shapes: x (N, C, H, W), the branch (N, C', about H/2s, about W/2s) for a block of stride s, y as the block's output.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from timm.layers import StdConv2d
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from torch import Tensor, nn

from razorlab.errors import UserError
from razorlab.models.proxylessnas import proxylessnas, read_checkpoint
from razorlab.models.standardised import StandardisedConv2d

POOL = 2
KERNEL_SIZE = 5
SMALL_KERNEL_SIZE = 3  # in the released network's last four branches, whose maps have 4 rows for images of 128 px
NARROW = 4
CONV_GROUPS = 2
CHANNELS_PER_GROUP = 8  # of group norm


class AveragePool(nn.Module):
    """``nn.AvgPool2d(2)`` that keeps nothing for backward, where torch's keeps its whole input."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H // 2, W // 2); a map of a single row or column is left as it is."""
        height, width = (size // POOL for size in x.shape[2:])
        if not height or not width:
            return x
        cropped = x[..., : height * POOL, : width * POOL]
        return cropped.unflatten(3, (width, POOL)).unflatten(2, (height, POOL)).mean((3, 5))


class LiteResidual(nn.Module):
    """A frozen main path with a trained lite branch beside it.

    Args:
        main: (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride).
        in_channels, out_channels, stride: those of ``main``.
        kernel_size: of the branch's group convolution.
    """

    def __init__(
        self, main: nn.Module, in_channels: int, out_channels: int, stride: int, kernel_size: int = KERNEL_SIZE
    ) -> None:
        super().__init__()
        self.main = main
        self.lite = nn.Sequential(
            AveragePool(),
            StdConv2d(in_channels, in_channels, kernel_size, stride, kernel_size // 2, groups=CONV_GROUPS),
            nn.GroupNorm(in_channels // CHANNELS_PER_GROUP, in_channels),
            nn.ReLU(inplace=True),
            StdConv2d(in_channels, out_channels, 1),
            nn.GroupNorm(out_channels // CHANNELS_PER_GROUP, out_channels),
        )
        nn.init.zeros_(self.lite[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output plus the upsampled branch."""
        y = self.main(x)
        return y + F.interpolate(self.lite(x), size=y.shape[2:], mode="bilinear", align_corners=False)


def insert_lite_residuals(model: nn.Module) -> tuple[str, ...]:
    """Put a ``LiteResidual`` around the convolutional path of every inverted residual block, in place. A network that
    has such branches already, as ``tinytl_network``, stays as it is.

    Knows ofa's blocks (ProxylessNAS) and timm's (MobileNetV2, EfficientNet). A block that the architecture search
    reduced to its shortcut has no such path and gets no branch: 20 of ProxylessNAS-Mobile's 22 blocks have one.

    Returns:
        Names of the modules put in, or of those that are there.

    Raises:
        UserError: the network has no inverted residual blocks, or channels that group norm's groups do not divide.
    """
    there = [name for name, module in model.named_modules() if isinstance(module, LiteResidual)]
    if there:
        return tuple(there)
    inserted = []
    for name, module in list(model.named_modules()):
        shape = _shape(module)
        if shape is None:
            continue
        if any(channels % CHANNELS_PER_GROUP for channels in shape[:2]):
            raise UserError(
                f"method=tinytl: {name} has {shape[0]} to {shape[1]} channels, which are no multiples of "
                f"{CHANNELS_PER_GROUP}, the channels of a norm group; choose another model"
            )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LiteResidual(module, *shape))
        inserted.append(name)
    if not inserted:
        raise UserError(
            f"method=tinytl is not possible for {type(model).__name__}: it has no inverted residual blocks; choose "
            "model=tinytl, proxylessnas, mobilenetv2 or efficientnet_lite0, or another method"
        )
    return tuple(inserted)


def _shape(module: nn.Module) -> tuple[int, int, int] | None:
    """Input channels, output channels and stride of an inverted residual block's path; None for anything else."""
    if isinstance(module, InvertedResidual):
        return module.conv_pw.in_channels, module.conv_pwl.out_channels, module.conv_dw.stride[0]
    if isinstance(module, DepthwiseSeparableConv):
        return module.conv_dw.in_channels, module.conv_pw.out_channels, module.conv_dw.stride[0]
    if type(module).__name__ == "MBConvLayer":  # by name: ofa takes seconds to import
        return module.in_channels, module.out_channels, module.stride
    return None


def tinytl_network(num_classes: int = 1000, dropout: float = 0.2) -> nn.Module:
    """TinyTL's released network with random weights: (N, 3, S, S) -> (N, num_classes) logits.

    ProxylessNAS-Mobile with 19 branches: the first block has none, nor have the two that the architecture search
    reduced to their shortcuts. Batch norm becomes group norm of 8 channels per group, with its epsilon; convolutions
    without a bias standardise their weights.
    """
    network = proxylessnas(num_classes, dropout=dropout)
    found = [(name, module, _shape(module)) for name, module in network.named_modules()]
    paths = [(name, module, shape) for name, module, shape in found if shape is not None][1:]
    for number, (name, module, shape) in enumerate(paths):
        kernel_size = SMALL_KERNEL_SIZE if number >= len(paths) - NARROW else KERNEL_SIZE
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, LiteResidual(module, *shape, kernel_size))
    epsilon = next(module.eps for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    for name, module in list(network.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, nn.BatchNorm2d):
            channels = module.num_features
            norm = nn.GroupNorm(channels // CHANNELS_PER_GROUP, channels, epsilon)
            setattr(network.get_submodule(parent), child, norm)
        elif isinstance(module, nn.GroupNorm):
            module.eps = epsilon
        elif isinstance(module, nn.Conv2d) and module.bias is None:
            setattr(network.get_submodule(parent), child, StandardisedConv2d.of(module))
    return network


_RELEASED_NAMES = {
    "mobile_inverted_conv": "conv",
    "main_branch": "main",
    "lite_residual.conv1": "lite.1",
    "lite_residual.bn1": "lite.2",
    "lite_residual.conv2": "lite.4",
    "lite_residual.final_bn": "lite.5",
}


def load_released_weights(network: nn.Module, file: Path) -> None:
    """Load all of TinyTL's released file but its head into ``tinytl_network``.

    Raises:
        ValueError: the file is of another network.
    """
    state = {}
    for name, tensor in read_checkpoint(file).items():
        for theirs, ours in _RELEASED_NAMES.items():
            name = name.replace(f".{theirs}.", f".{ours}.")
        state[name] = tensor
    own = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("classifier.")}
    state = {name: tensor for name, tensor in state.items() if not name.startswith("classifier.")}
    wrong = sorted(
        name
        for name in own.keys() | state.keys()
        if name not in own or name not in state or own[name].shape != state[name].shape
    )
    if wrong:
        raise ValueError(f"{len(wrong)} tensors differ, first {wrong[0]}")
    nn.Module.load_state_dict(network, state, strict=False)
