"""LayerNorm over rows that keeps its normalised input in 8 or 4 bits, in plain PyTorch.

Forward: out = z * weight + bias with z = (x - mean) * rstd, and z stored as ``rowquant`` says. Backward, with h the
stored z and g the gradient times ``weight``: rstd * (g - mean(g) - h * mean(g * h)) (Ba et al.,
https://arxiv.org/abs/1607.06450).

Shape legend: R rows, m elements per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rowquant import reference as rowquant


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, bits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(R, m), weight and bias (m,) -> out (R, m) of x's dtype, codes uint8 (R, ceil(m * bits / 8)), scales (R,)
    float16, rstd (R,) float32."""
    out, mean, rstd = torch.native_layer_norm(x, (x.shape[1],), weight, bias, eps)
    mean, rstd = mean.flatten().float(), rstd.flatten().float()
    return out, *rowquant.encode(x, mean, rstd, bits), rstd


def backward(
    grad: Tensor, codes: Tensor, scales: Tensor, rstd: Tensor, weight: Tensor | None, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """grad (R, m), codes and scales of ``forward``, rstd (R,) float32 -> the gradient of x (R, m), of grad's dtype, and
    of weight and bias (m,), float32. All arithmetic is float32."""
    z = rowquant.decode(codes, scales, grad.shape[1], bits, torch.float32)
    wide = grad.float()
    scaled = wide if weight is None else wide * weight.float()
    centred = scaled - scaled.mean(1, keepdim=True) - z * (scaled * z).mean(1, keepdim=True)
    return (centred * rstd.unsqueeze(1)).to(grad.dtype), (wide * z).sum(0), wide.sum(0)
