"""The product of a feature map and a gate a channel (squeeze-excite, LayerScale): the map is kept pruned, the gate
dense."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codecs import Layout, Pruned, mark, pack_shared, unpack
from ..codecs.roles import DENSE
from .common import needs_grad, sample_chunks
from .transforms import differentiable_once


def channel_scale(x: Tensor, gate: Tensor, codec: Pruned, flag: Tensor) -> Tensor:
    """x * gate, where gate broadcasts to x (B, ...). The gate's gradient uses x_hat = unpack(pack(x)); the gradient of
    x is exact."""
    if not needs_grad(x, gate) or not _broadcasts_to(gate.shape, x.shape):
        return x * gate
    layout, packed = None, ()
    if gate.requires_grad:
        packed, layout = pack_shared(x, codec, flag)
    return _ChannelScale.apply(x, gate, layout, *packed)


def _broadcasts_to(shape: torch.Size, target: torch.Size) -> bool:
    aligned = zip(reversed(shape), reversed(target), strict=False)
    return 0 < len(target) >= len(shape) and all(size in (1, wanted) for size, wanted in aligned)


class _ChannelScale(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, gate: Tensor, layout: Layout | None, *packed: Tensor) -> Tensor:
        return x * gate

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        _, gate, ctx.layout, *packed = inputs
        ctx.gate_shape = gate.shape
        ctx.save_for_backward(mark(gate, DENSE, "gate") if ctx.needs_input_grad[0] else None, *packed)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, *packed = ctx.saved_tensors
        need_x, need_gate, *rest = ctx.needs_input_grad
        grad_x = grad * gate if need_x else None
        grad_gate = _gate_gradient(grad, tuple(packed), ctx.layout, ctx.gate_shape) if need_gate else None
        return grad_x, grad_gate, *(None for _ in rest)


def _gate_gradient(grad: Tensor, packed: tuple[Tensor, ...], layout: Layout, shape: torch.Size) -> Tensor:
    """sum of grad * x_hat over the dimensions that the gate was broadcast along."""
    own_batch = len(shape) == grad.dim() and shape[0] == grad.shape[0]
    parts, total = [], None
    for start, stop in sample_chunks(layout.shape[0], layout.sample_numel * grad.element_size(), grad.device):
        product = unpack(packed, layout, start, stop, grad.dtype).mul_(grad[start:stop])
        if own_batch:
            parts.append(product.sum_to_size(stop - start, *shape[1:]))
        else:
            part = product.sum_to_size(shape)
            total = part if total is None else total.add_(part)
    if own_batch:
        return torch.cat(parts) if parts else grad.new_zeros(shape)
    return grad.new_zeros(shape) if total is None else total
