"""The output of attention as the input of the projection behind it, read from what attention keeps of q, k and v.

Attention under "int8" and "int4" keeps codes of q, k and v and works its output out again from them. So the projection
need not keep that output, which pruning suits badly: few of its elements stand out, and tokens have little in common.

Shape legend: B samples, H heads of q, N queries, M keys, e width of a value head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ..codecs import Form, Packed
from ..codecs.rows import RowsForm
from .attention_pieces import per_head, scores_of
from .common import sample_chunks

# Keys per element of a token, at most: above it the scores cost a larger share of a block's arithmetic. A block of
# width C takes about 72 C^2 operations per token, the output once more 4 M C.
MOST_KEYS = 0.5


@dataclass(frozen=True, slots=True)
class AttendedForm(Form):
    """softmax(scale q k^T) v of the stored q, k and v, as tokens (B, N, H e). Stored are the tensors of ``parts``, one
    part after another."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[RowsForm, ...]
    factor: float
    of_scores: bool

    @property
    def count(self) -> int:
        return sum(part.count for part in self.parts)

    def read(self, tensors: tuple[Tensor, ...], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        heads, queries, keys = *self.parts[0].shape[1:3], self.parts[1].shape[2]
        out = torch.empty(stop - start, *self.shape[1:], dtype=dtype, device=tensors[0].device)
        by_head = out.view(stop - start, queries, heads, -1).transpose(1, 2)
        row_bytes = heads * queries * keys * out.element_size()
        for first, last in sample_chunks(stop - start, row_bytes, out.device):
            stored = iter(tensors)
            q, k, v = (
                part.read(tuple(islice(stored, part.count)), start + first, start + last, dtype) for part in self.parts
            )
            p = scores_of(q, per_head(k, heads), self.factor, self.of_scores).softmax(dim=-1)
            by_head[first:last] = p @ per_head(v, heads)
        return out


def attended(parts: Sequence[Packed], factor: float, of_scores: bool) -> Packed | None:
    """What stands for the output of attention, whose q, k and v are kept as ``parts``; None where working it out again
    would cost more than a few per cent of a block's arithmetic."""
    q, k, v = (packed.form for packed in parts)
    width = q.shape[1] * v.shape[3]
    if k.shape[2] > MOST_KEYS * width:
        return None
    form = AttendedForm((q.shape[0], q.shape[2], width), q.dtype, (q, k, v), factor, of_scores)
    return Packed(tuple(tensor for packed in parts for tensor in packed.tensors), form)


def by_tokens(out: Tensor) -> bool:
    """Whether out (B, H, N, e) lies token by token, so that the tokens (B, N, H e) are a view of it."""
    return out.transpose(1, 2).is_contiguous() and math.prod(out.shape) > 0
