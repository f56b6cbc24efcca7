"""Convolutions with standardised weights (Qiao, Wang, Liu, Shen, Yuille; arXiv 1903.10520), as TinyTL trains them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-5


def standardised(weight: Tensor) -> Tensor:
    """Return ``weight`` (C', C, K, K) with mean 0 and sample deviation 1 for each output channel.

    ``(w - mean(w)) / (std(w) + 1e-5)``; timm's form takes the population's deviation and adds its epsilon to the
    variance.
    """
    std, mean = torch.std_mean(weight, dim=(1, 2, 3), keepdim=True)
    return (weight - mean) / (std + EPSILON)


class StandardisedConv2d(nn.Conv2d):
    """``nn.Conv2d`` that standardises its weight whenever it is used."""

    @classmethod
    def of(cls, layer: nn.Conv2d) -> StandardisedConv2d:
        """Return such a convolution with ``layer``'s settings and weight, without a bias."""
        shape = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        made = cls(*shape, groups=layer.groups, bias=False)
        made.weight = layer.weight
        return made

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        weight = standardised(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
