"""``F.scaled_dot_product_attention`` by the razored operator, in every form that it is called with.

Shape legend: B samples, * any dimensions between, N queries, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .attention import AttentionCodec, attention
from .transforms import one_node


def fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, grouped: bool) -> bool:
    """Whether ``sdpa`` has a form for these arguments of ``F.scaled_dot_product_attention``: batches of one type whose
    leading dimensions agree, but for grouped heads and a single one. What PyTorch refuses is not among them."""
    if not all(isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 3 for x in (q, k, v)):
        return False
    if q.is_nested or len({x.dim() for x in (q, k, v)}) > 1 or len({x.dtype for x in (q, k, v)}) > 1:
        return False
    if k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1] or not q.shape[0]:
        return False
    if mask is not None and (is_causal or not isinstance(mask, Tensor) or mask.dim() > q.dim()):
        return False
    if q.shape[:-2] == k.shape[:-2]:
        return True
    if q.dim() != 4 or q.shape[0] != k.shape[0] or not k.shape[1] or q.shape[1] % k.shape[1]:
        return False
    return grouped or k.shape[1] == 1  # one head for all is broadcast


@one_node
def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    codec: AttentionCodec,
    flag: Tensor,
    scales_scores: bool = False,
    dense: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """``attention`` with the arguments of ``F.scaled_dot_product_attention`` that ``fits`` accepts: (B, *, N, d) with
    any number of dimensions between. ``dense`` is the call itself, of q, k and v: the forward is what it gives where
    the rule allows."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lead, shapes = q.shape[:-2], [x.shape for x in (q, k, v)]

    def fused(*inputs: Tensor) -> Tensor:
        out = dense(*(x.view(shape) for x, shape in zip(inputs, shapes, strict=True)))
        return out.view(*inputs[0].shape[:3], out.shape[-1])

    if q.dim() != 4:
        heads = lead[-1] if q.dim() > 4 else 1
        if mask is not None and mask.dim() > 2:
            mask = mask.expand(*lead, *mask.shape[-2:]).reshape(-1, heads, *mask.shape[-2:])
        q, k, v = (x.reshape(-1, heads, *x.shape[-2:]) for x in (q, k, v))
    out = attention(q, k, v, mask, dropout_p, is_causal, scale, codec, flag, scales_scores, fused if dense else None)
    return out if len(lead) == 2 else out.view(*lead, *out.shape[-2:])
