"""Blocks of convolutions that run some samples at a time, from their first layer to their last.

What is wide inside a block, such as the expansion of an inverted residual, then never exists for the whole batch,
neither in forward nor in backward. That is right only where every sample is treated by itself and the convolution
library rounds a part of the batch as it rounds the whole. So a container runs in chunks only if all that it holds is
known (see ``_Walk``), as it stands at this call; and only where that saves more than it costs.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..codecs import Bits
from ..codecs.shared import is_kept_by_another
from ..functional.chunked import Bounds, in_chunks
from ..functional.common import autocast_dtype
from ..functional.conv import explicit, same_backend
from ..functional.epilogue import LANES
from ..functional.transforms import is_transformed
from ..kernels.dispatch import on_cuda
from . import qualified_name
from .base import ORIGINAL, DropIn
from .known import (
    class_before,
    has_patched_parts,
    is_globally_hooked,
    is_known,
    is_own,
    is_sequential,
    is_untouched,
    link_of,
)

_TIMM_BLOCKS = "timm.models._efficientnet_blocks"
_RESNETS = ("timm.models.resnet", "torchvision.models.resnet")


class Block(NamedTuple):
    """The names of a block's children: those that its input goes through in turn, and those of its shortcut."""

    path: tuple[str, ...]
    shortcut: tuple[str, ...] = ()


_INVERTED = "conv_s2d", "bn_s2d", "conv_pw", "bn1", "conv_dw", "bn2", "aa", "se", "conv_pwl", "bn3", "drop_path"
_SEPARABLE = "conv_s2d", "bn_s2d", "conv_dw", "bn1", "aa", "se", "conv_pw", "bn2", "drop_path"
_BASIC = "conv1", "bn1", "drop_block", "act1", "relu", "aa", "conv2", "bn2", "se", "drop_path", "act2"
_BOTTLENECK = (
    *("conv1", "bn1", "act1", "relu", "conv2", "bn2", "drop_block", "act2", "aa", "conv3", "bn3", "se", "drop_path"),
    "act3",
)
BLOCKS: dict[str, Block] = {
    f"{_TIMM_BLOCKS}.InvertedResidual": Block(_INVERTED),
    f"{_TIMM_BLOCKS}.DepthwiseSeparableConv": Block(_SEPARABLE),
    f"{_TIMM_BLOCKS}.EdgeResidual": Block(("conv_exp", "bn1", "aa", "se", "conv_pwl", "bn2", "drop_path")),
    f"{_TIMM_BLOCKS}.ConvBnAct": Block(("conv", "bn1", "aa", "drop_path")),
    **{f"{resnet}.BasicBlock": Block(_BASIC, ("downsample",)) for resnet in _RESNETS},
    **{f"{resnet}.Bottleneck": Block(_BOTTLENECK, ("downsample",)) for resnet in _RESNETS},
    "torchvision.models.mobilenetv2.InvertedResidual": Block(("conv",)),
    "torchvision.models.mobilenetv3.InvertedResidual": Block(("block",)),
    "ofa.utils.layers.MBConvLayer": Block(("inverted_bottleneck", "depth_conv", "point_linear")),
    "ofa.utils.layers.ResidualBlock": Block(("conv",), ("shortcut",)),
}
# The children of a network that its forward calls first, in turn.
STEMS: dict[str, tuple[str, ...]] = {
    "timm.models.efficientnet.EfficientNet": ("conv_stem", "bn1", "blocks"),
    "timm.models.mobilenetv3.MobileNetV3": ("conv_stem", "bn1", "blocks"),
    "timm.models.resnet.ResNet": ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3"),
    "torchvision.models.resnet.ResNet": ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"),
    "ofa.imagenet_classification.networks.proxyless_nets.ProxylessNASNets": ("first_conv", "blocks"),
}
# Gates per channel: the names of their convolutions, in turn, on one position, each with the activation behind it.
_GATES: dict[str, tuple[tuple[str, str], ...]] = {
    f"{_TIMM_BLOCKS}.SqueezeExcite": (("conv_reduce", "act1"), ("conv_expand", "gate")),
    "timm.layers.squeeze_excite.SEModule": (("fc1", "act"), ("fc2", "gate")),
    "torchvision.ops.misc.SqueezeExcitation": (("fc1", "activation"), ("fc2", "scale_activation")),
}
_GATE_PARTS = (
    *(f"torch.nn.modules.{name}" for name in ("activation.Sigmoid", "activation.Hardsigmoid", "linear.Identity")),
    *(f"timm.layers.activations.{name}" for name in ("Sigmoid", "HardSigmoid")),
    "torch.nn.modules.pooling.AdaptiveAvgPool2d",
)
_NOTHING = ("timm.layers.drop.DropPath",)  # where it drops nothing

# A module is cut whose widest tensor takes more for the whole batch. Then a chunk's takes at most as much, or two
# samples, which the convolution library runs at full speed, or a sample per thread; and there are four chunks or more.
WIDE_BYTES = 6 << 20
FEWEST_SAMPLES, FEWEST_CHUNKS = 2, 4

Shape = tuple[int, int, int]  # channels, height, width


class _Unknown(Exception):
    """Something that may look at several samples, or that this library does not know."""


class _Running(threading.local):
    """Whether this thread is inside of a chunk."""

    inside = False


_running = _Running()


def may_run_in_chunks(container: nn.Module) -> bool:
    """Whether the class of ``container`` is one whose calls may run in chunks: a block, or some one after another, as
    at the beginning of a network."""
    return bool(_block_of(container) or stem_of(container)) or (
        is_sequential(class_before(container)) and any(map(_has_convolutions, container.children()))
    )


def stem_of(network: nn.Module) -> list[nn.Module]:
    """The layers and blocks that a network's forward calls first, in turn; none where that is not known."""
    cls = class_before(network)
    names = STEMS.get(qualified_name(cls))
    if names is None or not is_known(cls) or has_patched_parts(network):
        return []
    if getattr(network, "grad_checkpointing", False):
        return []
    found: list[nn.Module] = []
    for name in names:
        child = network._modules.get(name)
        if child is None:
            return []
        listed, cls = type(child) is nn.ModuleList, class_before(child)
        several = listed or (found and is_sequential(cls))
        if several and not listed and not (is_untouched(child) and cls.__call__ is nn.Module.__call__):
            break
        found += list(child._modules.values()) if several else [child]
    return found if len(set(map(id, found))) == len(found) else []


def _has_convolutions(module: nn.Module) -> bool:
    return link_of(module) == "conv" or may_run_in_chunks(module)


def block_in_chunks(forward: Callable[[Tensor], Tensor], container: nn.Module, x: object) -> Tensor | None:
    """``forward(x)``, the forward of ``container``, in chunks; None where it is to run on all samples at once."""
    if _block_of(container) is None or not isinstance(x, Tensor) or not _may_be_cut(x):
        return None
    run = _Run(x)
    return run.chunked(forward, x) if run.add(partial(_Walk.children_of, container=container), container) else None


def run_in_chunks(forward: Callable[[list[nn.Module], Tensor], Tensor], children: list[nn.Module], x: object) -> tuple:
    """(how many, their output): as many of ``children``, which a Sequential calls one after the other, as run in chunks
    together. ``forward(children, x)`` calls some of them. (0, x) where the first is to run on all samples at once."""
    if not isinstance(x, Tensor) or not _may_be_cut(x):
        return 0, x
    run, count = _Run(x), 0
    while count < len(children) and run.add(partial(_Walk.through, module=children[count]), children[count]):
        count += 1
    return (count, run.chunked(partial(forward, children[:count]), x)) if count else (0, x)


def _may_be_cut(x: Tensor) -> bool:
    """Whether x (B, C, H, W) is one that may be cut into chunks, and large enough."""
    if _running.inside or torch.jit.is_tracing() or not torch.is_grad_enabled():
        return False
    if x.is_nested or x.layout != torch.strided:
        return False
    if x.dim() != 4 or x.shape[0] <= FEWEST_SAMPLES:
        return False
    # what makes more than sixteen bytes of one is rare
    if x.device.type != "cpu" or on_cuda(x.device) or 16 * x.numel() * x.element_size() < WIDE_BYTES:
        return False
    if is_globally_hooked() or is_transformed() or is_kept_by_another(x):
        return False
    return _is_plain(x) and x.is_floating_point()


def _is_plain(x: Tensor) -> bool:
    """Whether x lies in memory as a new tensor of its shape: ``is_contiguous`` also holds for some that the convolution
    library takes as channels_last."""
    stride, wanted = 1, []
    for size in reversed(x.shape):
        wanted.append(stride)
        stride *= max(size, 1)
    return x.stride() == tuple(reversed(wanted))


class _Run:
    """What runs in chunks together, one module after another, on samples of x."""

    def __init__(self, x: Tensor) -> None:
        cast = autocast_dtype(x)
        self._like = x.detach() if cast is None else x.detach().new_empty((), dtype=cast).expand(x.shape)
        self._needs = x.requires_grad
        self._shape: Shape = (x.shape[1], x.shape[2], x.shape[3])
        self._trained = self._widest = 0
        self._convolutions: list[tuple] = []
        self._bounds: Bounds | None = None

    def add(self, way: Callable[[_Walk], Shape], module: nn.Module) -> bool:
        """Let ``module`` run, too, through which ``way`` goes; returns False where it is not to."""
        walk = _Walk(self._like, bool(self._convolutions))
        try:
            shape = way(walk, shape=self._shape)
        except _Unknown:
            return False
        if walk.convolutions and self._like.shape[0] * walk.widest <= WIDE_BYTES:
            return False
        if not walk.convolutions and not self._convolutions:
            return False
        if any(p.requires_grad and p.element_size() < 4 for p in module.parameters()):
            return False  # autograd would sum the chunks' gradients in 16 bits
        trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
        found = self._bounds_of(
            max(self._widest, walk.widest), self._trained + trained, [*self._convolutions, *walk.convolutions]
        )
        if found is None:
            return False
        self._shape, self._bounds, self._trained = shape, found, self._trained + trained
        self._widest = max(self._widest, walk.widest)
        self._convolutions += walk.convolutions
        return True

    def _bounds_of(self, widest: int, trained: int, convolutions: list[tuple]) -> Bounds | None:
        """(start, stop) over the samples, or None where they are to run at once."""
        batch = self._like.shape[0]
        size = max(min(WIDE_BYTES // widest, batch // FEWEST_CHUNKS), FEWEST_SAMPLES, torch.get_num_threads())
        # the gradients of weights lie beside the parameters' own until the first chunk is through
        if size >= batch or trained > (batch - size) * widest // 4 or not (trained or self._needs):
            return None
        count = -(-batch // size)
        bounds = [(batch * i // count, batch * (i + 1) // count) for i in range(count)]
        sizes = {batch, *(stop - start for start, stop in bounds)}
        return bounds if all(same_backend(sizes, *conv) for conv in convolutions) else None

    def chunked(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``forward(x)``, chunk by chunk."""
        _running.inside = True
        try:
            return in_chunks(forward, x, self._bounds)
        finally:
            _running.inside = False


class _Walk:
    """The way of a sample's shape through modules. ``widest``: bytes of the widest sample that a convolution takes or
    makes. Raises _Unknown at what may treat samples together, change its input, or is not known."""

    def __init__(self, like: Tensor, begun: bool) -> None:
        self.like, self._begun = like, begun  # whether a convolution has gone before
        self.widest = 0
        self.convolutions: list = []

    def through(self, module: nn.Module | None, shape: Shape) -> Shape:
        """What ``module``, called on a sample of ``shape``, makes of it."""
        if module is None or type(module) is nn.Identity:
            return self._kept(module, shape)
        if "parametrizations" in module._modules:  # a weight that is worked out at each call
            raise _Unknown
        if link_of(module) == "conv":
            return self._convolved(module, shape)
        if link_of(module) == "activation" or _is_fixed_norm(module):
            if not (self._begun or self.convolutions) or not all(map(is_own, module.modules())):
                raise _Unknown  # before the first convolution it may change the block's input in place
            if not all(map(_is_exact, module.modules())) and math.prod(shape) % LANES:
                raise _Unknown
            return shape
        if isinstance(module, DropIn) and module.__dict__[ORIGINAL] is nn.MaxPool2d:
            return self._pooled(module, shape)
        if qualified_name(type(module)) in _NOTHING and not (module.training and getattr(module, "drop_prob", 0)):
            return self._kept(module, shape)
        if not is_untouched(module):
            raise _Unknown
        gate = _GATES.get(qualified_name(_plain_class(module)))
        return self.children_of(module, shape) if gate is None else self._gated(module, gate, shape)

    def children_of(self, container: nn.Module, shape: Shape) -> Shape:
        """What the forward of ``container`` makes of a sample of ``shape``."""
        block = _block_of(container)
        children = container._modules
        cls = class_before(container)
        if block is None:
            if not is_sequential(cls) or cls.__call__ is not nn.Module.__call__:
                raise _Unknown
            for child in children.values():
                shape = self.through(child, shape)
            return shape
        if not set(children) <= {*block.path, *block.shortcut}:
            raise _Unknown
        for name in block.shortcut:
            self.through(children.get(name), shape)
        for name in block.path:
            shape = self.through(children.get(name), shape)
        return shape

    def _pooled(self, module: Any, shape: Shape) -> Shape:
        if not is_own(module) or not (self._begun or self.convolutions):
            raise _Unknown
        settings = module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode
        channels, height, width = F.max_pool2d(torch.empty(shape, device="meta"), *settings).shape
        return channels, height, width

    def _gated(self, module: nn.Module, gate: tuple[tuple[str, str], ...], shape: Shape) -> Shape:
        if not (is_own(module) if isinstance(module, DropIn) else is_known(_plain_class(module))):
            raise _Unknown
        for name, child in module.named_children():
            plain = link_of(child) == "activation" or qualified_name(_plain_class(child)) in _GATE_PARTS
            if name not in dict(gate) and not (plain and is_own(child)):
                raise _Unknown
        one = shape[0], 1, 1
        for name, activation in gate:
            one = self.through(module._modules[name], one)
            if not _is_exact(module._modules[activation]) and one[0] % LANES:
                raise _Unknown
        return shape

    def _kept(self, module: nn.Module | None, shape: Shape) -> Shape:
        if module is not None and not is_untouched(module):
            raise _Unknown
        return shape

    def _convolved(self, module: Any, shape: Shape) -> Shape:
        weight = module.weight
        if not is_own(module) or shape[0] != weight.shape[1] * module.groups or not _is_plain(weight):
            raise _Unknown
        x = self.like.new_empty(()).expand(1, *shape)
        spec = explicit(module._spec(x), weight.shape[2:])
        left, right, top, bottom = spec.pad or (0, 0, 0, 0)
        padded = shape[1] + top + bottom + 2 * spec.padding[0], shape[2] + left + right + 2 * spec.padding[1]
        height, width = (
            (size - dilation * (kernel - 1) - 1) // stride + 1
            for size, dilation, kernel, stride in zip(padded, spec.dilation, weight.shape[2:], spec.stride, strict=True)
        )
        if min(height, width) < 1:
            raise _Unknown
        made = weight.shape[0], height, width
        self.widest = max(self.widest, max(x.numel(), math.prod(made)) * x.element_size())
        self.convolutions.append((x, weight.detach().to(x.dtype), spec))
        return made


def _plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before ``razor_`` changed it."""
    return module.__dict__[ORIGINAL] if isinstance(module, DropIn) else class_before(module)


def _is_exact(module: nn.Module) -> bool:
    """Whether the module is no activation whose last elements PyTorch works out otherwise than whole vectors of them:
    exponentials and the like are rounded in two ways."""
    if link_of(module) == "activation":
        return isinstance(module.epilogue(), Bits) or getattr(module, "_function", None) == "hardswish"
    return not _plain_class(module).__name__.endswith("Sigmoid") or "Hard" in _plain_class(module).__name__


def _is_fixed_norm(module: nn.Module) -> bool:
    """Whether the module is a norm on running statistics, with no other part than an activation."""
    if link_of(module) != "norm" or module.training or getattr(module, "running_mean", None) is None:
        return False
    return all(type(part) is nn.Identity or link_of(part) == "activation" for part in module.children())


def _block_of(container: nn.Module) -> Block | None:
    """What is known of the class of ``container`` as a block."""
    cls = class_before(container)
    block = BLOCKS.get(qualified_name(cls))
    return block if block is not None and is_known(cls) and cls.__call__ is nn.Module.__call__ else None
