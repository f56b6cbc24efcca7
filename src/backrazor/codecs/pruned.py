"""The pruned codec: of each sample, the K elements of the largest magnitude and their positions.

K = n - max(floor(n * s), 1) + 1 for a sample of n elements at sparsity s (floor in float64): the count that the
released code keeps where no magnitudes tie. It depends on the shape alone, so bytes are known before the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import INTEGERS, Stored, index_bytes, stored_dtype, topk_pack, topk_unpack, topk_unpack_normalised
from .packed import Form, Packed
from .roles import INDEX, PRUNED, QUANTISED, SCALES, mark


def kept_count(n: int, sparsity: float) -> int:
    """K, how many of a sample's n elements are kept."""
    return n - max(math.floor(n * sparsity), 1) + 1 if n else 0


@dataclass(frozen=True, slots=True)
class Pruned:
    """sparsity in [0, 1); values: "float32", "float16", "bfloat16", "int8" or "int4"; index: "auto", "bitmap" or
    "tile"; fill: what stands for the dropped in the input of a weight (see ``inputs``): "zero", "mean" or "known"."""

    sparsity: float
    values: str
    index: str = "auto"
    fill: str = "zero"

    @property
    def guesses(self) -> bool:
        """Whether backward reads something else than zero for a dropped element."""
        return self.fill != "zero" and self.sparsity > 0

    def form(self, x: Tensor) -> PrunedForm:
        """How x (B, ...) is going to be stored."""
        n = math.prod(x.shape[1:])
        keep = kept_count(n, self.sparsity)
        channels_last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        return PrunedForm(
            shape=tuple(x.shape),
            dtype=x.dtype,
            keep=keep,
            values=_stored_type(self.values, x.dtype),
            index=_index(self.index, n, keep),
            channels_last=channels_last,
        )


def whole_values(values: str) -> str:
    """The ``values`` of what is kept whole though others are pruned: no fewer than 8 bits."""
    return "int8" if values == "int4" else values


def _stored_type(values: str, dtype: torch.dtype) -> str:
    """Never wider than the input, and a 16-bit input is not re-rounded: "float32" is lossless for every type."""
    name = str(dtype).removeprefix("torch.")
    if values in INTEGERS or (values != "float32" and dtype in (torch.float32, torch.float64)):
        return values
    return name


def _index(index: str, n: int, keep: int) -> str:
    if keep == n:
        return "none"
    if index != "auto":
        return index
    return min(("tile", "bitmap"), key=lambda kind: index_bytes(n, keep, kind))


@dataclass(frozen=True, slots=True)
class PrunedForm(Form):
    """The K kept elements of each sample and their index: the non-empty ones of the tensors of ``kernels.Stored``."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    keep: int
    values: str
    index: str
    channels_last: bool

    @property
    def stored_dtype(self) -> torch.dtype:
        return stored_dtype(self.values)

    @property
    def count(self) -> int:
        return sum(self._present)

    @property
    def _present(self) -> tuple[bool, ...]:
        return (True, self.values in INTEGERS, self.index != "none", self.index == "tile", self.index == "tile")

    def pack(self, x: Tensor, flag: Tensor) -> tuple[Tensor, ...]:
        """What is stored of x."""
        return self.marked(topk_pack(x.detach(), self.keep, self.values, self.index, flag))

    def marked(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What there is of the five tensors of ``kernels.Stored``, with their roles."""
        roles = (PRUNED if self.index != "none" else QUANTISED, SCALES, INDEX, INDEX, INDEX)
        return tuple(
            mark(part, role) for part, role, present in zip(parts, roles, self._present, strict=True) if present
        )

    def stored(self, tensors: tuple[Tensor, ...], start: int, stop: int) -> Stored:
        """Samples start to stop as the kernels take them."""
        rows = iter(tensor[start:stop] for tensor in tensors)
        empty = tensors[0].new_empty(0, dtype=torch.uint8)
        return Stored(*(next(rows) if present else empty for present in self._present))

    def read(self, tensors: tuple[Tensor, ...], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        dense = topk_unpack(*self.stored(tensors, start, stop), self.sample_numel, self.index, dtype)
        return self.shaped(dense)

    def shaped(self, dense: Tensor) -> Tensor:
        """Samples (b, n) as the activation lay."""
        dense = dense.view(dense.shape[0], *self.shape[1:])
        return dense.contiguous(memory_format=torch.channels_last) if self.channels_last else dense

    def read_normalised(
        self, tensors: tuple[Tensor, ...], statistics: tuple[Tensor, Tensor], start: int, stop: int, dtype: torch.dtype
    ) -> Tensor:
        """(x_hat - mean) * rstd of samples start to stop, contiguous (stop - start, ...) of ``dtype``; ``statistics``
        are (stop - start, rows) float32."""
        mean, rstd = statistics
        row = self.sample_numel // max(mean.shape[1], 1)
        stored = self.stored(tensors, start, stop)
        dense = topk_unpack_normalised(*stored, mean, rstd, self.sample_numel, row, self.index, dtype)
        return dense.view(stop - start, *self.shape[1:])


def pack(x: Tensor, codec: Pruned, flag: Tensor) -> Packed:
    """Pack x (B, ...), float32, float64, float16 or bfloat16, any strides. ``flag`` (int32, one element) collects
    non-finite values and overflow."""
    form = codec.form(x)
    return Packed(form.pack(x, flag), form)
