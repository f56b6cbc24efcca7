"""Products with a packed operand on the CPU: entries from the packed form, the gradient as a matrix, sums of scaled
rows.

Each weight's sum runs over samples and positions in one order whatever the number of threads.

Shape legend: B samples, C/D input/output channels, T tokens, I/O inputs/outputs of a Linear, groups of 16 outputs.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..cpu.entries import EntryPoint, Worker
from ..cpu.launch import launch, threads_for
from ..cpu.layout import KIND
from ..cpu.target import has_avx512
from ..topk._cpu_form import form_of
from ..topk.layout import TILE, Stored, kept_of
from . import reference
from ._cpu_form import (
    BLOCK,
    CHANNELS,
    INPUTS,
    MOST_VECTORS,
    STRIDED,
    SUBSETS,
    TABLE_VECTORS,
    TABLES,
    TILE_BYTES,
    VECTOR,
    Add,
    AddDepthwise,
    AddMasked,
    Lay,
    MakeEntries,
    Spread,
)
from .layout import LANES, Axis, Masked, Window, axes

# The gradient of so many samples is laid out as a matrix at once, at least of one.
MATRIX_BYTES = 4 << 20

ENTRIES = Worker(f"{__package__}._cpu_entries", "entries_worker")
LAY = Worker(f"{__package__}._cpu_sums", "lay_worker")
ADD = Worker(f"{__package__}._cpu_sums", "add_worker")
ADD_DEPTHWISE = Worker(f"{__package__}._cpu_sums", "depthwise_worker")
SPREAD = Worker(f"{__package__}._cpu_masked", "spread_worker")
ADD_MASKED = Worker(f"{__package__}._cpu_masked", "masked_worker")


def entry_points() -> Iterator[EntryPoint]:
    """All that is ever launched from here."""
    yield ENTRIES, MakeEntries, ()
    yield ADD, Add, ()
    yield SPREAD, Spread, ()
    yield ADD_MASKED, AddMasked, ()
    for kind in KIND.values():
        yield LAY, Lay, (kind,)
        yield ADD_DEPTHWISE, AddDepthwise, (kind,)


class _Entries(NamedTuple):
    """entries (B, K, 2) int32 and starts (B, buckets + 2) int32: see ``_cpu_entries``."""

    entries: Tensor
    starts: Tensor

    def of(self, sample: int) -> dict[str, int]:
        """Where those from ``sample`` on lie: the fields of ``_cpu_form.Entries``."""
        entries, starts = self
        pitch, step = entries.stride(0) * 4, starts.stride(0) * 4
        return {
            "entries": entries.data_ptr() + sample * pitch,
            "entry_pitch": pitch,
            "starts": starts.data_ptr() + sample * step,
            "start_pitch": step,
        }


def _entries(
    stored: Stored,
    index: str,
    n: int,
    order: int,
    buckets: int,
    size: tuple[int, int],
    strides: tuple[int, int],
    pitch: int,
    unit: int,
) -> _Entries:
    """``size`` is (height, width) of what positions count through, ``pitch`` the rows of the matrix from one line of
    positions to the next, ``unit`` the bytes of a row."""
    batch, keep = stored.values.shape[0], kept_of(stored, n, index)
    made = _Entries(
        torch.empty(batch, keep, 2, dtype=torch.int32, device="cpu"),
        torch.empty(batch, buckets + 2, dtype=torch.int32, device="cpu"),
    )
    scratch_bytes = ((keep + LANES) + (keep + TILE + 64) + (0 if order == CHANNELS else keep)) * 4
    scratch = torch.empty(threads_for(batch) * scratch_bytes, dtype=torch.uint8, device="cpu")
    told = MakeEntries(
        **form_of(stored, n, index),
        **made.of(0),
        order=order,
        buckets=buckets,
        height=size[0],
        width=size[1],
        down=strides[0],
        across=strides[1],
        pitch=pitch,
        unit=unit,
        scratch=scratch.data_ptr(),
        scratch_bytes=scratch_bytes,
    )
    launch(ENTRIES, told, batch)
    return made


def _table(by_class: list[list[tuple[int, int]]]) -> ctypes.Array:
    """Taps by class, as kernels read them: where each class begins and ends, counted in pairs of words, then the pairs
    (tap, offset in bytes)."""
    head = len(by_class) + 1
    words, pairs = [], -(-head // 2)
    for taps in by_class:
        words.append(pairs)
        pairs += len(taps)
    words.append(pairs)
    words += [0] * (head % 2)
    words += [word for taps in by_class for pair in taps for word in pair]
    return (ctypes.c_int64 * len(words))(*words)


def _piece(channels: int, ranges: int) -> int:
    """Channels of a piece of work where outputs come in ``ranges``: about four pieces per thread."""
    return -(-channels // max(min(-(-4 * torch.get_num_threads() // ranges), channels), 1))


def _add(
    sums: Tensor,
    entries: _Entries,
    first: int,
    batch: int,
    matrix: tuple[int, int],
    table: ctypes.Array,
    shape: tuple[int, int, int, int],
) -> None:
    """Samples ``first`` to first + ``batch``; ``matrix`` is its address and the bytes from a sample to the next;
    ``shape`` (channels, classes, taps, groups)."""
    channels, classes, taps, groups = shape
    ranges = -(-groups // (MOST_VECTORS if has_avx512() else 4))
    piece = _piece(channels, ranges)
    told = Add(
        **entries.of(first),
        batch=batch,
        channels=channels,
        piece=piece,
        ranges=ranges,
        groups=groups,
        matrix=matrix[0],
        matrix_pitch=matrix[1],
        sums=sums.data_ptr(),
        classes=classes,
        table=ctypes.addressof(table),
        taps=taps,
    )
    launch(ADD, told, -(-channels // piece) * ranges)


def _lay(grad: Tensor, matrix: Tensor, border: int, pitch: int) -> None:
    """grad (b, D, Ho, Wo), contiguous, into matrix (b, rows, padded D) of float32: position (h, w) to row border + h *
    pitch + w."""
    batch, outputs, height, width = grad.shape
    groups = matrix.shape[2] // LANES
    scratch_bytes = 2 * TILE_BYTES + 2 * VECTOR
    scratch = torch.empty(threads_for(batch * groups) * scratch_bytes, dtype=torch.uint8, device="cpu")
    told = Lay(
        batch=batch,
        groups=groups,
        outputs=outputs,
        positions=height * width,
        width=width,
        pitch=pitch,
        border=border,
        source=grad.data_ptr(),
        matrix=matrix.data_ptr(),
        matrix_pitch=matrix.stride(0) * 4,
        unit=matrix.stride(1) * 4,
        scratch=scratch.data_ptr(),
        scratch_bytes=scratch_bytes,
    )
    launch(LAY, told, batch * groups, (KIND[grad.dtype],))


def linear(sums: Tensor, grad: Tensor, stored: Stored, index: str) -> None:
    """See the reference."""
    batch, tokens, outputs = grad.shape
    inputs, wide = sums.shape
    unit, table = wide * 4, _table([[(0, 0)]])
    entries = _entries(stored, index, tokens * inputs, INPUTS, inputs, (tokens, inputs), (1, 1), 1, unit)
    in_place = grad.dtype == torch.float32 and wide == outputs and grad.is_contiguous()
    together = max(batch if in_place else min(MATRIX_BYTES // (tokens * unit), batch), 1)
    copy = None if in_place else torch.zeros(together, tokens, wide, device="cpu")
    for first in range(0, batch, together):
        rows = grad[first : first + together]
        if copy is not None:
            copy[: len(rows), :, :outputs] = rows
        matrix = (rows if copy is None else copy).data_ptr(), tokens * unit
        _add(sums, entries, first, len(rows), matrix, table, (inputs, 1, 1, wide // LANES))


def conv(sums: Tensor, grad: Tensor, stored: Stored, index: str, window: Window, masked: Masked | None = None) -> None:
    """See the reference."""
    grad = grad.contiguous()
    vertical, horizontal = axes(window, tuple(grad.shape[2:]))
    if window.depthwise:
        _conv_depthwise(sums, grad, stored, index, window, vertical, horizontal)
        return
    channels, height, width = window.shape
    batch, outputs = grad.shape[:2]
    wide = sums.shape[2]
    pitch, rows, unit = horizontal.size, vertical.size * horizontal.size, wide * 4
    down, across = window.stride
    classes = down * across
    by_class = [  # (tap, how many rows further it looks)
        [
            (row * window.kernel[1] + column, low * pitch + right)
            for row, low in vertical.taps[which // across]
            for column, right in horizontal.taps[which % across]
        ]
        for which in range(classes)
    ]
    entries = _entries(
        stored,
        index,
        math.prod(window.shape),
        CHANNELS if classes == 1 else STRIDED,
        channels * classes,
        (height, width),
        window.stride,
        pitch,
        unit,
    )
    together = max(min(MATRIX_BYTES // (rows * unit), batch), 1)
    table = _table([[(tap, shift * unit) for tap, shift in taps] for taps in by_class])
    border = vertical.border * pitch + horizontal.border
    rows = rows if masked is None else -(-rows // BLOCK) * BLOCK
    bare = grad.shape[2] * grad.shape[3] == rows and outputs == wide
    matrix = (torch.empty if bare else torch.zeros)(together, rows, wide)
    for first in range(0, batch, together):
        count = min(together, batch - first)
        _lay(grad[first : first + count], matrix, border, pitch)
        at = matrix.data_ptr(), rows * unit
        _add(sums, entries, first, count, at, table, (channels, classes, sums.shape[1], wide // LANES))
        if masked is not None:
            part = Masked(*(tensor[first : first + count] for tensor in masked))
            _add_masked(sums, part, matrix, by_class, window, pitch)


def _add_masked(
    sums: Tensor, masked: Masked, matrix: Tensor, by_class: list[list[tuple[int, int]]], window: Window, pitch: int
) -> None:
    """The samples of ``masked``; ``by_class``: pairs (tap, shift in rows of the ``matrix``), which has whole blocks of
    them."""
    (batch, _), (channels, height, width), (down, across) = masked.mask.shape, window.shape, window.stride
    rows, wide = matrix.shape[1:]
    classes = down * across
    front = -(-max((shift for taps in by_class for _, shift in taps), default=0) // 8) * 8
    string_bytes = -(-(front + max(rows, -(-height // down) * pitch) + 128) // 64) * 8  # read and written 8 at a time
    strings = torch.empty(batch, channels, classes, string_bytes, dtype=torch.uint8, device="cpu")
    told = Spread(
        batch=batch,
        channels=channels,
        height=height,
        width=width,
        down=down,
        across=across,
        pitch=pitch,
        front=front,
        source=masked.mask.data_ptr(),
        source_pitch=masked.mask.stride(0),
        strings=strings.data_ptr(),
        string_bytes=string_bytes,
    )
    launch(SPREAD, told, batch * channels)
    ranges = sum(divmod(wide // LANES, TABLE_VECTORS))
    piece = _piece(channels, ranges)
    tasks = -(-channels // piece) * ranges
    scratch_bytes = TABLES * SUBSETS * TABLE_VECTORS * VECTOR
    scratch = torch.empty(threads_for(tasks) * scratch_bytes, dtype=torch.uint8, device="cpu")
    guess, table = masked.guess.contiguous(), _table(by_class)
    told = AddMasked(
        batch=batch,
        channels=channels,
        piece=piece,
        groups=wide // LANES,
        rows=rows,
        matrix=matrix.data_ptr(),
        matrix_pitch=matrix.stride(0) * 4,
        unit=matrix.stride(1) * 4,
        front=front,
        strings=strings.data_ptr(),
        string_bytes=string_bytes,
        numbers=guess.data_ptr(),
        sums=sums.data_ptr(),
        classes=classes,
        table=ctypes.addressof(table),
        taps=sums.shape[1],
        scratch=scratch.data_ptr(),
        scratch_bytes=scratch_bytes,
    )
    launch(ADD_MASKED, told, tasks)


def _conv_depthwise(
    sums: Tensor, grad: Tensor, stored: Stored, index: str, window: Window, vertical: Axis, horizontal: Axis
) -> None:
    channels, height, width = window.shape
    batch, _, out_height, out_width = grad.shape
    n, pitch = math.prod(window.shape), horizontal.size
    entries = _entries(stored, index, n, CHANNELS, channels, (height, width), (1, 1), pitch, 4)
    table = _table([[(tap, place * pitch * 4) for tap, place in vertical.taps[0]]])
    size = vertical.size * pitch + LANES  # the last row is read a vector at a time
    scratch_bytes = size * 4 + 2 * VECTOR
    scratch = torch.empty(threads_for(channels) * scratch_bytes, dtype=torch.uint8, device="cpu")
    told = AddDepthwise(
        **entries.of(0),
        batch=batch,
        channels=channels,
        outputs=out_height * out_width,
        width=out_width,
        size=size,
        pitch=pitch,
        border=vertical.border * pitch + horizontal.border,
        source=grad.data_ptr(),
        sums=sums.data_ptr(),
        table=ctypes.addressof(table),
        taps=window.kernel[0],
        scratch=scratch.data_ptr(),
        scratch_bytes=scratch_bytes,
    )
    launch(ADD_DEPTHWISE, told, channels, (KIND[grad.dtype],))


def transposed(sums: Tensor, outputs: int) -> Tensor:
    """See the reference."""
    inputs = sums.shape[0]
    if outputs != sums.shape[1] or inputs % LANES:
        return reference.transposed(sums, outputs)
    out = torch.empty(outputs, inputs, device="cpu")
    _lay(sums.view(1, inputs, outputs, 1), out.unsqueeze(0), 0, 1)
    return out
