"""Products with a packed operand in plain PyTorch: unpack, then the dense product."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..topk import reference as topk_reference
from ..topk.layout import Stored
from .layout import Masked, Window, lanes_of_taps


def _dense(stored: Stored, n: int, index: str) -> Tensor:
    return topk_reference.unpack(*stored, n, index, torch.float32)


def linear(sums: Tensor, grad: Tensor, stored: Stored, index: str) -> None:
    """sums (I, padded O) += x_hat^T grad for grad (B, T, O)."""
    batch, tokens, outputs = grad.shape
    x_hat = _dense(stored, tokens * sums.shape[0], index).view(batch * tokens, sums.shape[0])
    sums[:, :outputs] += x_hat.t() @ grad.reshape(batch * tokens, outputs).float()


def conv(sums: Tensor, grad: Tensor, stored: Stored, index: str, window: Window, masked: Masked | None = None) -> None:
    """sums (see ``sums_shape``) += the weight's gradient for grad (B, D, Ho, Wo)."""
    channels, height, width = window.shape
    n = math.prod(window.shape)
    x_hat = _dense(stored, n, index).view(-1, *window.shape)
    if masked is not None:
        bits = topk_reference.unpack_bits(masked.mask, n).view(x_hat.shape)
        x_hat = x_hat + bits * masked.guess[:, :, None, None]
    # what the output sees below and to the right of the input
    reach = [
        (size - 1) * stride + (kernel - 1) * dilation + 1 - padding - length
        for size, stride, kernel, dilation, padding, length in zip(
            grad.shape[2:], window.stride, window.kernel, window.dilation, window.padding, (height, width), strict=True
        )
    ]
    (top, left), (bottom, right) = window.padding, reach
    weight = grad.new_empty((grad.shape[1], 1 if window.depthwise else channels, *window.kernel), dtype=torch.float32)
    total = torch.ops.aten.convolution_backward(
        grad.float(),
        F.pad(x_hat, (left, right, top, bottom)),
        weight,
        None,
        window.stride,
        (0, 0),
        window.dilation,
        False,
        (0, 0),
        channels if window.depthwise else 1,
        (False, True, False),
    )[1]
    if window.depthwise:
        sums[:, :, lanes_of_taps(window, tuple(grad.shape[2:]))] += total.squeeze(1)
    else:
        sums[..., : grad.shape[1]] += total.permute(1, 2, 3, 0).flatten(1, 2)


def transposed(sums: Tensor, outputs: int) -> Tensor:
    """sums (I, padded O) -> (O, I)."""
    return sums[:, :outputs].t().clone(memory_format=torch.contiguous_format)
