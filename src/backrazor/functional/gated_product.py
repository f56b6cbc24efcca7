"""The product of an activation and a tensor of the same shape, as gated MLPs have (SwiGLU, GEGLU): both factors are
kept in few bits, and a Linear behind it reads its input from them (Shazeer, https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

from torch import Tensor

from ..codecs import NOTHING, Form, Packed, Ranged, all_packed_of, load, remember_source, save
from ..codecs.ranged import ProductForm
from ..config import bits_of
from ..kernels.sealed import sealed
from ..kernels.topk.layout import NON_FINITE
from .common import needs_grad, raise_flag
from .transforms import RazorFunction, differentiable_once, one_node


@one_node
def gated_product(a: Tensor, b: Tensor, kept: str, flag: Tensor) -> Tensor:
    """a * b, both (B, ...) of one shape and type. ``kept``: "int8" or "int4", or "rest", which keeps what PyTorch does.

    The gradients are grad * b_hat and grad * a_hat, from what ``Ranged`` keeps of both. Where both are kept, the output
    carries a note that a layer reading it directly may use a_hat * b_hat instead of packing it again.
    """
    bits = bits_of(kept)
    codec = None if bits is None else Ranged(bits)
    if codec is None or a.shape != b.shape or a.dtype != b.dtype or not needs_grad(a, b) or not codec.fits(a):
        return a * b
    kept_a = codec.pack(a.detach()) if b.requires_grad else None
    kept_b = codec.pack(b.detach()) if a.requires_grad else None
    both = [packed for packed in (kept_a, kept_b) if packed is not None]
    for packed in both:
        raise_flag(flag, NON_FINITE * (~packed.tensors[1].isfinite()).any())
    parts = [argument for packed in (kept_a, kept_b) for argument in (NOTHING if packed is None else packed.arguments)]
    out = _GatedProduct.run(a, b, *parts)
    if len(both) == 2:
        form = ProductForm(both[0].form, both[1].form)
        remember_source(out, Packed((*both[0].tensors, *both[1].tensors), form))
    return out


class _GatedProduct(RazorFunction):
    @staticmethod
    def forward(a: Tensor, b: Tensor, *parts: Form | Tensor | None) -> Tensor:
        return a * b

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        save(ctx, *all_packed_of(inputs[2:]))

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept_a, kept_b = load(ctx)
        grad_a = grad_b = None
        if kept_b is not None:
            (grad_a,) = _times(grad, kept_b)
        if kept_a is not None:
            (grad_b,) = _times(grad, kept_a)
        return grad_a, grad_b, *(None for _ in ctx.needs_input_grad[2:])


@sealed(lambda grad, packed: (grad.new_empty(grad.shape),))
def _times(grad: Tensor, packed: Packed) -> tuple[Tensor]:
    """grad * x_hat."""
    return (packed.unpack(dtype=grad.dtype).mul_(grad),)
