"""LayerNorm that packs its output, as operators."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ..dispatch import implementation, triton_by_name
from ..operators import operator
from ..rowquant.ops import encode_fake
from . import reference
from .layout import LONGEST_ROW


@_disable_dynamo
def fused_norm(x: Tensor, m: int) -> bool:
    """Whether ``norm_forward`` and ``norm_backward`` are one kernel each for rows of m elements of x's type and device.

    Only where BACKRAZOR_KERNELS asks for Triton by name: its forward sums in another order than PyTorch's, and by
    default every forward equals the dense one to the bit.
    """
    return triton_by_name() and _norm_kernel(x, m) is not None


def _norm_kernel(x: Tensor, m: int) -> ModuleType | None:
    return implementation("layernorm", x) if 0 < m <= LONGEST_ROW else None


def _norm_forward_fake(x, weight, bias, eps, bits):
    codes, scales = encode_fake(x, None, None, bits)
    return torch.empty_like(x), codes, scales, x.new_empty((x.shape[0],), dtype=torch.float32)


@operator(
    "norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps, int bits) -> (Tensor, Tensor, Tensor, Tensor)",
    _norm_forward_fake,
)
def norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, bits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LayerNorm of x (R, m), weight and bias (m,): out (R, m), and what backward reads: codes and scales
    as ``row_encode`` gives them, rstd (R,) float32."""
    x = x.contiguous()
    fast = _norm_kernel(x, x.shape[1])
    return (fast or reference).forward(x, weight, bias, eps, bits)


def _norm_backward_fake(grad, codes, scales, rstd, weight, bits):
    sums = [grad.new_empty((grad.shape[1],), dtype=torch.float32) for _ in range(2)]
    return torch.empty_like(grad), *sums


@operator(
    "norm_backward(Tensor grad, Tensor codes, Tensor scales, Tensor rstd, Tensor? weight, int bits) -> "
    "(Tensor, Tensor, Tensor)",
    _norm_backward_fake,
)
def norm_backward(
    grad: Tensor, codes: Tensor, scales: Tensor, rstd: Tensor, weight: Tensor | None, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x (R, m), of weight and of bias (m,) float32 from the gradient (R, m) and what ``norm_forward``
    gave."""
    grad, codes, scales, rstd = (part.contiguous() for part in (grad, codes, scales, rstd))
    fast = _norm_kernel(grad, grad.shape[1])
    return (fast or reference).backward(grad, codes, scales, rstd, weight, bits)
