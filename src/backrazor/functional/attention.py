"""Scaled dot-product attention that keeps q, k, v (and, in the paper's form, the softmax output) small.

Shape legend: B samples, H heads, N queries, M keys, d/e width of a key/value head. P = softmax(scale q k^T + mask), out
= dropout(P) v.

Rules. "pruned" is the paper's: q, k, P and v pruned per sample, softmax backward from the pruned P. "int8" and "int4"
keep q, k and v quantised per row and recompute P in backward, as flash attention does (Dao et al.,
https://arxiv.org/abs/2205.14135); each is stored without its mean over the tokens, and k's
mean is not kept at all: it adds the same number to every score of a query, which softmax and its gradient ignore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..codecs import (
    Bits,
    Form,
    Packed,
    Pruned,
    Rows,
    load,
    mark,
    pack,
    pack_derivative,
    remember_attended,
    role_of,
    save_outputs,
    times,
)
from ..codecs.derivative import DerivativeForm
from ..codecs.roles import DENSE
from ..config import bits_of
from ..kernels import fused_softmax, softmax_backward
from ..kernels.derivative.layout import code_bytes
from ..kernels.sealed import sealed, traced
from .attended import attended, by_tokens
from .attention_pieces import Piece, Sums, per_head, pieces, scores_of
from .common import autocast_dtype, needs_grad, not_a_view, raise_flag, sample_chunks
from .transforms import RazorFunction, differentiable_once, one_node


class AttentionCodec(NamedTuple):
    """rule: "pruned", "int8" or "int4"; ``pruned`` is the codec of the first."""

    rule: str
    pruned: Pruned

    @property
    def rows(self) -> tuple[Rows, Rows, Rows]:
        """How a quantised rule keeps q, k and v: k without its mean over the tokens."""
        bits = bits_of(self.rule)
        return Rows(bits, True), Rows(bits, False), Rows(bits, True)


class _Scale(NamedTuple):
    """The factor of the scores, and whether q k^T is multiplied by it rather than q."""

    factor: float
    of_scores: bool


@one_node
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    codec: AttentionCodec,
    flag: Tensor,
    scales_scores: bool = False,
    fused: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The unfused formula on q (B, H, N, d), k (B, G, M, d), v (B, G, M, e), some samples at a time; returns (B, H, N,
    e). Where there are fewer heads G of k and v than H, each serves H / G heads of q that follow one another.

    ``mask`` broadcasts to (B, H, N, M): bool (True takes part) or added to the scores, and may require a gradient.
    ``scales_scores``: scale (q k^T), where the formula to be equal to does, instead of q. ``fused`` computes
    the same of q, k and v in another way: the forward is what it gives, where the scores are neither kept nor dropped.
    """
    cast = autocast_dtype(q)
    if cast is not None:
        q, k, v = q.to(cast), k.to(cast), v.to(cast)
    if mask is not None:
        mask = mask.view(*(1,) * (4 - mask.dim()), *mask.shape)
    keeps = needs_grad(q, k, v, mask)
    scaled = _Scale(scale, scales_scores)
    fused = fused if dropout_p == 0 and codec.rule != "pruned" else None
    out, *kept = _Attention.run(q, k, v, mask, is_causal, dropout_p, scaled, codec, flag, keeps, fused)
    plain = mask is None and not is_causal and dropout_p == 0 and codec.rule != "pruned"
    if kept and plain and codec.pruned.guesses and by_tokens(out):  # else nobody asks, and the note would hold codes
        source = attended(_parts(kept, _forms(q, k, v, codec)), *scaled)
        if source is not None:
            remember_attended(out, source)
    return out


def _addend(mask: Tensor | None, is_causal: bool, scores: Tensor, first: int = 0) -> Tensor | None:
    """What is added to the scores, whose first row is that of query ``first``. Masks are kept as they were given, so
    that layers share them, and a causal one is made anew."""
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(first)
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, float("-inf"))
    return mask.to(scores.dtype)


def _of_samples(mask: Tensor | None, start: int, stop: int) -> Tensor | None:
    return mask if mask is None or mask.shape[0] == 1 else mask[start:stop]


def _probabilities(q: Tensor, k: Tensor, scale: _Scale, mask: Tensor | None, is_causal: bool, first: int = 0) -> Tensor:
    scores = scores_of(q, k, *scale)
    addend = _addend(mask, is_causal, scores, first)
    return (scores if addend is None else scores + addend).softmax(dim=-1)


def _unfused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: _Scale,
    codec: AttentionCodec,
    keeps: bool,
    flag: Tensor,
) -> tuple[Tensor, ...]:
    """The formula's value, and what backward reads."""
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    # token by token, as PyTorch's fused kernels lay it out: the tokens behind it are a view
    out = q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)
    noise = None
    if dropout_p > 0:  # drawn in one call, as the unfused formula draws it
        noise = F.dropout(q.new_ones(batch, heads, queries, keys), dropout_p, True)
    packs_probabilities = keeps and codec.rule == "pruned"
    probabilities = []
    for start, stop in sample_chunks(batch, heads * queries * keys * q.element_size(), q.device):
        part_k, part_v = (per_head(x[start:stop], heads) for x in (k, v))
        p = _probabilities(q[start:stop], part_k, scale, _of_samples(mask, start, stop), is_causal)
        if packs_probabilities:
            probabilities.append(pack(p, codec.pruned, flag))
        if noise is not None:
            p = p * noise[start:stop]
        out[start:stop] = p @ part_v
    out = not_a_view(out)
    if not keeps:
        return (out,)
    dropped = () if noise is None else pack_derivative(noise, Bits()).tensors
    return out, *dropped, *_kept(q, k, v, probabilities, codec, flag)


def _unfused_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: _Scale,
    codec: AttentionCodec,
    keeps: bool,
) -> tuple[Tensor, ...]:
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    status = q.new_empty(1, dtype=torch.int32)
    out = q.new_empty(batch, queries, heads, v.shape[3])
    if not keeps:
        return status, out
    dropped = (q.new_empty(batch, code_bytes(heads * queries * keys, 1), dtype=torch.uint8),) if dropout_p > 0 else ()
    return status, out, *dropped, *_kept(q, k, v, [], codec, status)


@sealed(_unfused_shapes)
def _sealed_unfused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: _Scale,
    codec: AttentionCodec,
    keeps: bool,
) -> tuple[Tensor, ...]:
    """Status bits, then what ``_unfused`` gives, its value by tokens (B, N, H, e)."""
    status = torch.zeros(1, dtype=torch.int32, device=q.device)
    out, *kept = _unfused(q, k, v, mask, is_causal, dropout_p, scale, codec, keeps, status)
    return status, out.transpose(1, 2), *kept


def _gradient_shapes(
    grad: Tensor,
    mask: Tensor | None,
    dropped: Packed | None,
    parts: tuple[Packed, ...],
    shapes: tuple[tuple[int, ...], ...],
    is_causal: bool,
    dropout_p: float,
    scale: _Scale,
    need_q: bool,
    need_k: bool,
    need_v: bool,
    need_mask: bool,
) -> tuple[Tensor | None, ...]:
    needs = zip(shapes, (need_q, need_k, need_v), strict=True)
    return *(grad.new_empty(shape) if need else None for shape, need in needs), mask if need_mask else None


@sealed(_gradient_shapes)
def _gradients(
    grad: Tensor,
    mask: Tensor | None,
    dropped: Packed | None,
    parts: tuple[Packed, ...],
    shapes: tuple[tuple[int, ...], ...],
    is_causal: bool,
    dropout_p: float,
    scale: _Scale,
    need_q: bool,
    need_k: bool,
    need_v: bool,
    need_mask: bool,
) -> tuple[Tensor | None, ...]:
    """Of q, k, v and mask. ``parts``: what is kept of q, k, v and, pruned, of P."""
    keep_scale = 0.0 if dropout_p >= 1 else 1 / (1 - dropout_p)
    batch, heads, queries = grad.shape[:3]
    keys = shapes[1][2]
    grads = [
        grad.new_empty(shape) if need else None for shape, need in zip(shapes, (need_q, need_k, need_v), strict=True)
    ]
    grad_mask = torch.zeros_like(mask) if need_mask else None
    row_bytes = keys * grad.element_size()
    for start, stop in sample_chunks(batch, heads * queries * row_bytes, grad.device):
        q, k, v, *p = (packed.unpack(start, stop, grad.dtype) for packed in parts)
        k, v = per_head(k, heads), per_head(v, heads)
        part, part_mask = grad[start:stop], _of_samples(mask, start, stop)
        parts_of_it = [Piece(slice(None), slice(None))]
        if not p and dropped is None and stop - start == 1:
            parts_of_it = pieces(heads, queries, row_bytes, is_causal, grad.device)
        sums = Sums(*(None if g is None else g[start:stop] for g in grads), heads, whole=len(parts_of_it) == 1)
        for piece in parts_of_it:
            piece_mask = None if part_mask is None else piece.of(part_mask)
            piece_q, piece_grad, first = piece.of(q), piece.of(part), piece.queries.start or 0
            # no query of a piece sees a later key
            seen = slice(piece.queries.stop if is_causal and len(parts_of_it) > 1 else None)
            piece_k, piece_v = k[:, piece.heads, seen], v[:, piece.heads, seen]
            # P is recomputed where it is not kept
            piece_p = p[0] if p else None
            if piece_p is None:
                piece_p = _probabilities(piece_q, piece_k, scale, piece_mask, is_causal, first)
            if need_v:
                after = piece_p if dropped is None else times(piece_p, dropped, start, stop).mul_(keep_scale)
                sums.add_value(piece, after, piece_grad)
                del after
            grad_p = piece_grad @ piece_v.transpose(-2, -1)
            fused = fused_softmax(grad_p) and not need_mask  # the mask takes the gradient before the scale
            if fused:
                bits = None if dropped is None else dropped.tensors[0][start:stop]
                grad_scores = softmax_backward(grad_p, piece_p, bits, keep_scale, scale.factor)
            else:
                if dropped is not None:
                    grad_p = times(grad_p, dropped, start, stop).mul_(keep_scale)
                grad_scores = torch.ops.aten._softmax_backward_data(grad_p, piece_p, -1, piece_p.dtype)
            del grad_p, piece_p
            if need_mask:
                target = piece.of(_of_samples(grad_mask, start, stop))
                target.add_(grad_scores.sum_to_size(target.shape))
            if not fused:
                grad_scores.mul_(scale.factor)
            sums.add_scores(piece, grad_scores, piece_q, piece_k)
        sums.close()
    return *grads, grad_mask


class _Attention(RazorFunction):
    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        dropout_p: float,
        scale: _Scale,
        codec: AttentionCodec,
        flag: Tensor,
        keeps: bool,
        fused: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
    ) -> tuple[Tensor, ...]:
        if fused is not None:
            out = not_a_view(fused(q, k, v))
            return (out, *_kept(q, k, v, [], codec, flag)) if keeps else (out,)
        given = q, k, v, mask, is_causal, dropout_p, scale, codec, keeps
        if not traced():
            return _unfused(*given, flag)
        status, tokens, *kept = _sealed_unfused(*given)
        raise_flag(flag, status[0])
        return not_a_view(tokens.transpose(1, 2)), *kept

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        q, k, v, mask, ctx.is_causal, ctx.dropout_p, ctx.scale, ctx.codec, _, keeps, _ = inputs
        _, *kept = output
        ctx.shapes = [x.shape for x in (q, k, v)]
        if not keeps:
            return
        forms = _forms(q, k, v, ctx.codec)
        if ctx.dropout_p > 0:
            forms = [DerivativeForm((*q.shape[:3], k.shape[2]), Bits()), *forms]
        parts = _parts(kept, forms)
        mask = None if mask is None else mark(mask, DENSE, "attention mask")
        save_outputs(ctx, kept, mask, *parts)

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        mask, *parts = load(ctx)
        dropped = parts.pop(0) if ctx.dropout_p > 0 else None
        shapes, settings = tuple(map(tuple, ctx.shapes)), (ctx.is_causal, ctx.dropout_p, ctx.scale)
        return *_gradients(grad, mask, dropped, tuple(parts), shapes, *settings, *needs[:4]), *(None for _ in needs[4:])


def _kept(
    q: Tensor, k: Tensor, v: Tensor, probabilities: list[Packed], codec: AttentionCodec, flag: Tensor
) -> list[Tensor]:
    """What backward reads of q, k, v and, pruned, of P: the tensors of each, one after another."""
    if codec.rule != "pruned":
        parts = [rows.pack(x).tensors for rows, x in zip(codec.rows, (q, k, v), strict=True)]
        return [tensor for tensors in parts for tensor in tensors]
    parts = [pack(x, codec.pruned, flag).tensors for x in (q, k, v)]
    if not probabilities:  # an empty batch
        probabilities = [pack(q.new_empty(*q.shape[:3], k.shape[2]), codec.pruned, flag)]
    parts.append(tuple(map(_join, zip(*(packed.tensors for packed in probabilities), strict=True))))
    return [tensor for tensors in parts for tensor in tensors]


def _forms(q: Tensor, k: Tensor, v: Tensor, codec: AttentionCodec) -> list[Form]:
    """How ``_kept`` stores each of its parts: known from the shapes."""
    if codec.rule != "pruned":
        return [rows.form(x) for rows, x in zip(codec.rows, (q, k, v), strict=True)]
    probabilities = q.new_empty(()).expand(*q.shape[:3], k.shape[2])
    return [codec.pruned.form(x) for x in (q, k, v, probabilities)]


def _parts(tensors: Iterable[Tensor], forms: Iterable[Form]) -> list[Packed]:
    """The tensors of each form, in order."""
    tensors = iter(tensors)
    return [Packed(tuple(islice(tensors, form.count)), form) for form in forms]


def _join(pieces: tuple[Tensor, ...]) -> Tensor:
    return mark(torch.cat(pieces), *role_of(pieces[0])) if len(pieces) > 1 else pieces[0]
