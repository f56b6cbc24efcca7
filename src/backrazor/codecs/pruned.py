"""The pruned codec: of each sample, the K elements of the largest magnitude and their positions.

K = n - max(floor(n * s), 1) + 1 for a sample of n elements at sparsity s (floor in float64): the count that the
released code keeps where no magnitudes tie. It depends on the shape alone, so bytes are known before the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import Stored, index_bytes, topk_pack, topk_unpack, topk_unpack_normalised
from .roles import INDEX, PRUNED, QUANTISED, SCALES, mark


def kept_count(n: int, sparsity: float) -> int:
    """K, how many of a sample's n elements are kept."""
    return n - max(math.floor(n * sparsity), 1) + 1 if n else 0


@dataclass(frozen=True, slots=True)
class Pruned:
    """sparsity in [0, 1); values: "float32", "float16", "bfloat16" or "int8"; index: "auto", "bitmap" or "tile"."""

    sparsity: float
    values: str
    index: str = "auto"

    def layout(self, x: Tensor) -> PackedLayout:
        """How x (B, ...) is going to be stored."""
        n = math.prod(x.shape[1:])
        keep = kept_count(n, self.sparsity)
        channels_last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        return PackedLayout(
            shape=tuple(x.shape),
            dtype=x.dtype,
            keep=keep,
            values=_stored_type(self.values, x.dtype),
            index=_index(self.index, n, keep),
            channels_last=channels_last,
        )


def _stored_type(values: str, dtype: torch.dtype) -> str:
    """Never wider than the input, and a 16-bit input is not re-rounded: "float32" is lossless for every type."""
    name = str(dtype).removeprefix("torch.")
    if values == "int8" or (values != "float32" and dtype in (torch.float32, torch.float64)):
        return values
    return name


def _index(index: str, n: int, keep: int) -> str:
    if keep == n:
        return "none"
    if index != "auto":
        return index
    return min(("tile", "bitmap"), key=lambda kind: index_bytes(n, keep, kind))


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """All that is needed beside the tensors to read a packed activation: static, known from the shape."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    keep: int
    values: str
    index: str
    channels_last: bool

    @property
    def sample_numel(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def stored_dtype(self) -> torch.dtype:
        return getattr(torch, self.values)

    @property
    def count(self) -> int:
        """How many tensors are stored."""
        return sum(_present(self))


class Packed(NamedTuple):
    """The non-empty stored tensors, in the order of ``Stored``, and the layout."""

    tensors: tuple[Tensor, ...]
    layout: PackedLayout


def _present(layout: PackedLayout) -> tuple[bool, ...]:
    return (True, layout.values == "int8", layout.index != "none", layout.index == "tile", layout.index == "tile")


def pack(x: Tensor, codec: Pruned, flag: Tensor) -> Packed:
    """Pack x (B, ...), float32, float64, float16 or bfloat16, any strides. ``flag`` (int32, one element) collects
    non-finite values and overflow."""
    layout = codec.layout(x)
    parts = topk_pack(x.detach(), layout.keep, layout.values, layout.index, flag)
    roles = (PRUNED if layout.index != "none" else QUANTISED, SCALES, INDEX, INDEX, INDEX)
    kept = zip(parts, roles, _present(layout), strict=True)
    return Packed(tuple(mark(part, role) for part, role, present in kept if present), layout)


def stored_of(tensors: tuple[Tensor, ...], layout: PackedLayout, start: int, stop: int) -> Stored:
    """Samples start to stop of the packed tensors, with the empty ones back in place."""
    rows = iter(tensor[start:stop] for tensor in tensors)
    empty = tensors[0].new_empty(0, dtype=torch.uint8)
    return Stored(*(next(rows) if present else empty for present in _present(layout)))


def unpack_pruned(
    tensors: tuple[Tensor, ...],
    layout: PackedLayout,
    start: int = 0,
    stop: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Samples start to stop as a dense tensor (stop - start, ...) of ``dtype`` (default: that of the input), in the
    input's memory format."""
    stop = layout.shape[0] if stop is None else stop
    dense = topk_unpack(
        *stored_of(tensors, layout, start, stop), layout.sample_numel, layout.index, dtype or layout.dtype
    )
    dense = dense.view(stop - start, *layout.shape[1:])
    return dense.contiguous(memory_format=torch.channels_last) if layout.channels_last else dense


def unpack_normalised(
    tensors: tuple[Tensor, ...],
    layout: PackedLayout,
    statistics: tuple[Tensor, Tensor],
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> Tensor:
    """(x_hat - mean) * rstd of samples start to stop, contiguous (stop - start, ...) of ``dtype``; ``statistics`` are
    (stop - start, rows) float32."""
    mean, rstd = statistics
    n = layout.sample_numel
    row = n // max(mean.shape[1], 1)
    stored = stored_of(tensors, layout, start, stop)
    dense = topk_unpack_normalised(*stored, mean, rstd, n, row, layout.index, dtype)
    return dense.view(stop - start, *layout.shape[1:])
