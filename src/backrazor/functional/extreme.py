"""The largest or smallest element along dimensions, which keeps one bit per element: whether it is one of those.

Shape legend: x (B, ...), any dimensions reduced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..codecs import Bits, Form, load, pack_derivative, packed_of, save
from .common import needs_grad
from .transforms import RazorFunction, differentiable_once, one_node


@one_node
def extreme(x: Tensor, dims: tuple[int, ...], keepdim: bool, largest: bool) -> Tensor:
    """``x.amax(dims, keepdim)``, or ``amin`` where not ``largest``. The gradient is PyTorch's to the bit: elements that
    are equally large share it evenly."""
    function = torch.amax if largest else torch.amin
    if not needs_grad(x) or x.dim() < 2 or not x.numel():
        return function(x, dims, keepdim)
    dims = tuple(sorted(dim % x.dim() for dim in dims)) or tuple(range(x.dim()))
    with torch.no_grad():
        found = x == function(x, dims, True)
        packed = pack_derivative(found.to(x.dtype), Bits())
    return _Extreme.run(x, dims, keepdim, largest, *packed.arguments)


class _Extreme(RazorFunction):
    @staticmethod
    def forward(x: Tensor, dims: tuple[int, ...], keepdim: bool, largest: bool, form: Form, *stored: Tensor) -> Tensor:
        return (torch.amax if largest else torch.amin)(x, dims, keepdim)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        x, ctx.dims, _, _, form, *stored = inputs
        ctx.reduced = tuple(1 if dim in ctx.dims else size for dim, size in enumerate(x.shape))
        save(ctx, packed_of(form, stored))

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = load(ctx)
        found = packed.unpack(dtype=grad.dtype)
        share = grad.reshape(ctx.reduced) / found.sum(ctx.dims, keepdim=True)
        return found.mul_(share), *(None for _ in ctx.needs_input_grad[1:])
