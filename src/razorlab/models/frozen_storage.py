"""Frozen weights stored at 8 bits: a k-means codebook of 256 values and a uint8 code per weight, decoded at use.

The float tensor is gone: a layer holds 1 byte per weight and 1 kB. Autograd keeps the codes, which the layer holds
anyway, and decodes them again in backward. TinyTL (arXiv 2007.11622) counts its frozen parameters this way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from timm.layers import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from razorlab.models.standardised import StandardisedConv2d, standardised

CODEBOOK = 256
ITERATIONS = 20
MAX_POINTS = 4096  # a layer with more weights is clustered by its sorted weights' means in as many equal runs
FLOAT_BYTES = 4


def kmeans_codebook(weights: np.ndarray) -> np.ndarray:
    """Return at most 256 centres, sorted, float32, of one-dimensional k-means over ``weights`` (n,), 20 iterations.

    It starts at equal distances, as Deep Compression does (Han, Mao, Dally; arXiv 1510.00149, section 3.2): the same
    weights always give the same codebook, and on EfficientNet-Lite0 the error is less than half of that from quantiles.
    """
    ordered = np.sort(weights.astype(np.float64))
    if len(ordered) > MAX_POINTS:
        starts = np.arange(MAX_POINTS) * len(ordered) // MAX_POINTS
        counts = np.diff(starts, append=len(ordered))
        points = np.add.reduceat(ordered, starts) / counts
    else:
        points, counts = ordered, np.ones(len(ordered))
    distinct = np.unique(points)
    if len(distinct) <= CODEBOOK:
        return distinct.astype(np.float32)
    start = np.linspace(distinct[0], distinct[-1], CODEBOOK)
    means = KMeans(CODEBOOK, init=start[:, None], n_init=1, max_iter=ITERATIONS, tol=0.0)
    means.fit(points[:, None], sample_weight=counts)
    return np.sort(means.cluster_centers_[:, 0]).astype(np.float32)


def encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(codes, codebook)``: uint8 of ``weight``'s shape, and float32 (256,) padded with its last centre."""
    flat = weight.detach().float().cpu().numpy().ravel()
    centres = kmeans_codebook(flat)
    codes = np.searchsorted((centres[1:] + centres[:-1]) / 2, flat)  # the nearest centre, exactly
    padded = np.concatenate([centres, np.repeat(centres[-1:], CODEBOOK - len(centres))])
    return torch.from_numpy(codes.astype(np.uint8)).reshape(weight.shape), torch.from_numpy(padded)


def decode(codes: Tensor, codebook: Tensor) -> Tensor:
    """Return the weight, float32 of ``codes``' shape."""
    return codebook.index_select(0, codes.flatten().int()).view(codes.shape)


class _Conv(torch.autograd.Function):
    """``F.conv2d`` with a coded weight that does not train, standardised where ``standardise`` says so."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        codebook: Tensor,
        bias: Tensor | None,
        options: dict[str, Any],
        standardise: bool,
    ) -> Tensor:
        ctx.save_for_backward(codes, codebook)
        ctx.shape, ctx.dtype, ctx.options, ctx.standardise = x.shape, x.dtype, options, standardise
        weight = decode(codes, codebook)
        return F.conv2d(x, standardised(weight) if standardise else weight, bias, **options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            weight = decode(*ctx.saved_tensors)
            weight = (standardised(weight) if ctx.standardise else weight).to(grad.dtype)
            x_grad = torch.nn.grad.conv2d_input(ctx.shape, weight, grad, **ctx.options).to(ctx.dtype)
        if ctx.needs_input_grad[3]:
            bias_grad = grad.sum((0, 2, 3), dtype=torch.float32)
        return x_grad, None, None, bias_grad, None, None


class _Linear(torch.autograd.Function):
    """``F.linear`` with a coded weight that does not train."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, codebook: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, codebook)
        ctx.dtype = x.dtype
        return F.linear(x, decode(codes, codebook), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (grad @ decode(*ctx.saved_tensors).to(grad.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[3]:
            bias_grad = grad.flatten(0, -2).sum(0, dtype=torch.float32)
        return x_grad, None, None, bias_grad


class _Coded:
    """What both layers share: ``weight`` is decoded each time it is read. Codes and codebook are buffers."""

    weight_codes: Tensor
    weight_codebook: Tensor

    @property
    def weight(self) -> Tensor:
        return decode(self.weight_codes, self.weight_codebook)


class CodedConv2d(_Coded, nn.Conv2d):
    """``nn.Conv2d`` whose frozen weight is stored at 8 bits."""

    standardise = False

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        x, padding = self._padded(x)
        options = {"stride": self.stride, "padding": padding, "dilation": self.dilation, "groups": self.groups}
        return _Conv.apply(x, self.weight_codes, self.weight_codebook, self.bias, options, self.standardise)

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """``x`` with what the convolution cannot pad by itself, and what it can."""
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            return x, self.padding
        if self.padding == "valid":
            return x, (0, 0)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._reversed_padding_repeated_twice, mode=mode), (0, 0)


class CodedConv2dSame(CodedConv2d, Conv2dSame):
    """timm's convolution that pads as TensorFlow does, by the size of its input."""

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        return pad_same(x, self.kernel_size, self.stride, self.dilation), (0, 0)


class CodedStandardisedConv2d(CodedConv2d, StandardisedConv2d):
    """The convolution whose decoded weight is standardised whenever it is used."""

    standardise = True


class CodedLinear(_Coded, nn.Linear):
    """``nn.Linear`` whose frozen weight is stored at 8 bits."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        return _Linear.apply(x, self.weight_codes, self.weight_codebook, self.bias)


CODED = {
    nn.Conv2d: CodedConv2d,
    Conv2dSame: CodedConv2dSame,
    StandardisedConv2d: CodedStandardisedConv2d,
    nn.Linear: CodedLinear,
}


def store_frozen_at_8_bits(model: nn.Module) -> tuple[str, ...]:
    """Replace the frozen weight of every layer of ``model`` whose class is in ``CODED`` by codes, in place.

    Left as they are: other classes, since their forward is their own; layers so small that codes and codebook would
    not be the smaller (341 weights or fewer).

    Returns:
        Names of the layers that were replaced.
    """
    replaced = []
    for name, module in model.named_modules():
        if type(module) not in CODED or module.weight.requires_grad:
            continue
        if module.weight.numel() * (FLOAT_BYTES - 1) <= CODEBOOK * FLOAT_BYTES:
            continue
        codes, codebook = encode(module.weight)
        device = module.weight.device
        del module.weight
        module.__class__ = CODED[type(module)]
        module.register_buffer("weight_codes", codes.to(device))
        module.register_buffer("weight_codebook", codebook.to(device))
        replaced.append(name)
    return tuple(replaced)


def coded_weights(model: nn.Module) -> int:
    """Count the weights of ``model`` that are stored at 8 bits."""
    return sum(module.weight_codes.numel() for module in model.modules() if isinstance(module, _Coded))
