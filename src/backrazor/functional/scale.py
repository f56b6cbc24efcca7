"""The product of a feature map and a gate a channel (squeeze-excite, LayerScale): the map is kept pruned, the gate
dense."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codecs import (
    CHANNELS,
    FEATURES,
    NOTHING,
    Form,
    Packed,
    Pruned,
    hand_on_activation,
    load,
    mark,
    pack_shared,
    packed_of,
    save,
)
from ..codecs.roles import DENSE
from ..kernels.sealed import sealed
from .common import needs_grad, sample_chunks
from .transforms import RazorFunction, differentiable_once, one_node


@one_node
def channel_scale(x: Tensor, gate: Tensor, codec: Pruned, flag: Tensor) -> Tensor:
    """x * gate, where gate broadcasts to x (B, ...). The gate's gradient uses x_hat = unpack(pack(x)); the gradient of
    x is exact."""
    if not needs_grad(x, gate) or not _broadcasts_to(gate.shape, x.shape):
        return x * gate
    use = CHANNELS if x.dim() > 2 and gate.dim() > 1 and gate.shape[-1] == 1 else FEATURES
    packed = pack_shared(x, codec, use, flag).arguments if gate.requires_grad else NOTHING
    out = _ChannelScale.run(x, gate, *packed)
    hand_on_activation(x, out, scaled=True)
    return out


def _broadcasts_to(shape: torch.Size, target: torch.Size) -> bool:
    aligned = zip(reversed(shape), reversed(target), strict=False)
    return 0 < len(target) >= len(shape) and all(size in (1, wanted) for size, wanted in aligned)


class _ChannelScale(RazorFunction):
    @staticmethod
    def forward(x: Tensor, gate: Tensor, form: Form | None, *stored: Tensor) -> Tensor:
        return x * gate

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        _, gate, form, *stored = inputs
        ctx.gate_shape = gate.shape
        save(ctx, mark(gate, DENSE, "gate") if ctx.needs_input_grad[0] else None, packed_of(form, stored))

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, packed = load(ctx)
        need_x, need_gate, *rest = ctx.needs_input_grad
        grad_x = grad * gate if need_x else None
        (grad_gate,) = _gate_gradient(grad, packed, ctx.gate_shape) if need_gate else (None,)
        return grad_x, grad_gate, *(None for _ in rest)


@sealed(lambda grad, packed, shape: (grad.new_empty(shape),))
def _gate_gradient(grad: Tensor, packed: Packed, shape: tuple[int, ...]) -> tuple[Tensor]:
    """sum of grad * x_hat over the dimensions that the gate was broadcast along."""
    own_batch = len(shape) == grad.dim() and shape[0] == grad.shape[0]
    parts, total = [], None
    for start, stop in sample_chunks(len(grad), packed.form.sample_numel * grad.element_size(), grad.device):
        product = packed.unpack(start, stop, grad.dtype).mul_(grad[start:stop])
        if own_batch:
            parts.append(product.sum_to_size(stop - start, *shape[1:]))
        else:
            part = product.sum_to_size(shape)
            total = part if total is None else total.add_(part)
    if own_batch:
        return (torch.cat(parts) if parts else grad.new_zeros(shape),)
    return (grad.new_zeros(shape) if total is None else total,)
