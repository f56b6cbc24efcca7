"""The parts that attention's backward is worked out in, and the sums over them.

Shape legend: b samples, H heads of q, G heads of k and v, N queries, M keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .common import sample_chunks, write


def per_head(x: Tensor, heads: int) -> Tensor:
    """x (b, G, ...) as (b, H, ...): each of its heads for those of q that it serves."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def scores_of(q: Tensor, k: Tensor, factor: float, of_scores: bool) -> Tensor:
    """factor q k^T of q (b, H, N, d) and k (b, H, M, d). ``of_scores``: the product is multiplied, rather than q."""
    if of_scores:
        return (q @ k.transpose(-2, -1)).mul_(factor)
    return (q * factor) @ k.transpose(-2, -1)


def _per_group(grad: Tensor, groups: int) -> Tensor:
    """The gradient of ``per_head``'s input from that of its output."""
    return grad if grad.shape[1] == groups else grad.unflatten(1, (groups, -1)).sum(2)


class Piece(NamedTuple):
    """Heads and queries of some samples that are worked on at once."""

    heads: slice
    queries: slice

    def of(self, x: Tensor) -> Tensor:
        """Its part of x (b, H or 1, N or 1, *)."""
        x = x if x.shape[1] == 1 else x[:, self.heads]
        return x if x.shape[2] == 1 else x[:, :, self.queries]


def pieces(heads: int, queries: int, row_bytes: int, is_causal: bool, device: torch.device) -> list[Piece]:
    """All heads and queries of a sample at once where its scores are small, else some heads, or some queries of one.
    ``row_bytes``: of one query's scores. Where these end at the query's own token, there are twice as many pieces of
    queries, each of which needs the keys up to its last one alone."""
    pieces = []
    for first, last in sample_chunks(heads, queries * row_bytes, device):
        single = last - first == 1
        at_once = row_bytes * 2 if is_causal else row_bytes
        rows = list(sample_chunks(queries, at_once, device)) if single else [(0, queries)]
        pieces += [Piece(slice(first, last), slice(start, stop)) for start, stop in rows]
    return pieces


class Sums:
    """The gradients of q, k and v of some samples, written into where they belong. Those of k and v are added up over
    pieces where there are several; a piece may have the first keys alone."""

    def __init__(self, q: Tensor | None, k: Tensor | None, v: Tensor | None, heads: int, whole: bool) -> None:
        self._q, self._k, self._v, self._whole = q, k, v, whole
        self._totals = [
            None if whole or x is None else x.new_zeros(len(x), heads, *x.shape[2:], dtype=_wide(x)) for x in (k, v)
        ]

    def add_value(self, piece: Piece, p: Tensor, grad: Tensor) -> None:
        """P^T grad, the gradient of v."""
        self._add(1, self._v, piece, p.transpose(-2, -1), grad)

    def add_scores(self, piece: Piece, scores: Tensor, q: Tensor, k: Tensor) -> None:
        """The gradients of q and k from that of the scores."""
        if self._q is not None:
            write(piece.of(self._q), torch.matmul, scores, k)
        if self._k is not None:
            self._add(0, self._k, piece, scores.transpose(-2, -1), q)

    def _add(self, which: int, out: Tensor, piece: Piece, a: Tensor, b: Tensor) -> None:
        if self._whole:
            _write_grouped(out, a, b)
        else:
            self._totals[which][:, piece.heads, : a.shape[-2]].add_(a @ b)

    def close(self) -> None:
        """Write the sums over pieces."""
        for out, total in zip((self._k, self._v), self._totals, strict=True):
            if total is not None:
                out.copy_(_per_group(total, out.shape[1]))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.element_size() == 2 else x.dtype


def _write_grouped(out: Tensor, a: Tensor, b: Tensor) -> None:
    """a @ b (b, H, ...) into ``out`` (b, G, ...), summed over the heads that a group serves."""
    if out.shape[1] == a.shape[1]:
        write(out, torch.matmul, a, b)
    else:
        out.copy_(_per_group(a @ b, out.shape[1]))
