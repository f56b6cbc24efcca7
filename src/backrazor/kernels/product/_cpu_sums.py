"""The matrix that entries look at, and the sums over them.

Shape legend: B samples, C/D input/output channels, P positions of the output, groups of 16 output channels.
"""

from __future__ import annotations

from numba import njit

from ..cpu.counters import count_threads, take_tasks
from ..cpu.lanes import by_kind, cast_load, copy_bytes, element_bytes
from ..cpu.layout import F32, LANES
from ..cpu.scalars import get_i64, put_f32
from ._cpu_form import MOST_VECTORS, TILE_BYTES, VECTOR
from ._cpu_lanes import add_products, transpose_tile

_transpose = by_kind(transpose_tile)


def _chain(vectors):
    """(vectors, ...): ``add_products(vectors)(...)``, one of those made beforehand."""
    own = add_products(vectors)
    if vectors == 1:

        @njit(forceinline=True)
        def only(_, *arguments):
            own(*arguments)

        return only
    rest = _chain(vectors - 1)

    @njit(forceinline=True)
    def chosen(count, *arguments):
        if count == vectors:
            own(*arguments)
        else:
            rest(count, *arguments)

    return chosen


_add = _chain(MOST_VECTORS)
_add_one = add_products(1)


@njit(forceinline=True)
def _clear(address, count):
    for i in range(count):
        put_f32(address + i * 4, 0.0)


@njit(forceinline=True)
def _partial_tile(kind, source, pitch, rows, columns, stage):
    """``rows`` of ``columns`` elements as a tile of float32 with zeros around them at ``stage``; a vector of scratch
    lies behind."""
    _clear(stage, LANES * LANES)
    spare = stage + TILE_BYTES
    for row in range(rows):
        copy_bytes(source + row * pitch, spare, columns * element_bytes(kind))
        cast_load(kind, spare, spare + VECTOR)
        copy_bytes(spare + VECTOR, stage + row * VECTOR, columns * 4)


@njit(forceinline=True)
def lay_worker(a, kind):
    """The gradient (B, D, P) as a matrix of rows of D, one per position, inside a border. A piece of work is a group of
    channels of a sample."""
    groups, outputs, positions, width = a.groups, a.outputs, a.positions, a.width
    pitch, unit, border, batch = a.pitch, a.unit, a.border, a.batch
    source, matrix, matrix_pitch = a.source, a.matrix, a.matrix_pitch
    stage = a.scratch + count_threads(a, 1) * a.scratch_bytes
    partial = stage + TILE_BYTES
    size = element_bytes(kind)
    task = take_tasks(a, 1)
    while task < batch * groups:
        sample, group = task // groups, task % groups
        at = source + (sample * outputs + group * LANES) * positions * size
        to = matrix + sample * matrix_pitch + border * unit + group * VECTOR
        rows = min(LANES, outputs - group * LANES)
        column, row = 0, 0
        for start in range(0, positions, LANES):
            columns = min(LANES, positions - start)
            if rows == LANES and columns == LANES:
                _transpose(kind, at + start * size, positions * size, stage)
            else:
                _partial_tile(kind, at + start * size, positions * size, rows, columns, partial)
                _transpose(F32, partial, VECTOR, stage)
            for i in range(columns):
                cast_load(F32, stage + i * VECTOR, to + (row * pitch + column) * unit)
                column += 1
                if column == width:
                    column = 0
                    row += 1
        task = take_tasks(a, 1)


@njit(forceinline=True)
def add_worker(a):
    """A piece of work is some input channels and one range of output channels."""
    channels, piece, ranges, groups = a.channels, a.piece, a.ranges, a.groups
    batch, entries, entry_pitch, starts, start_pitch = a.batch, a.entries, a.entry_pitch, a.starts, a.start_pitch
    matrix, matrix_pitch, sums = a.matrix, a.matrix_pitch, a.sums
    classes, table, taps = a.classes, a.table, a.taps
    pieces = (channels + piece - 1) // piece
    task = take_tasks(a, 1)
    while task < pieces * ranges:
        first = task % ranges * groups // ranges
        vectors = (task % ranges + 1) * groups // ranges - first
        for channel in range(task // ranges * piece, min((task // ranges + 1) * piece, channels)):
            for which in range(classes):
                bucket = channel * classes + which
                for i in range(get_i64(table + which * 8), get_i64(table + which * 8 + 8)):
                    tap, offset = get_i64(table + i * 16), get_i64(table + i * 16 + 8)
                    _add(
                        vectors,
                        entries,
                        starts + (bucket + 1) * 4,
                        batch,
                        entry_pitch,
                        start_pitch,
                        matrix + offset + first * VECTOR,
                        matrix_pitch,
                        sums + ((channel * taps + tap) * groups + first) * VECTOR,
                    )
        task = take_tasks(a, 1)


@njit(forceinline=True)
def depthwise_worker(a, kind):
    """A row of taps is one vector, and the gradient lies as it is, but for a border. A piece of work is a channel of
    all samples."""
    batch, channels, outputs, width, size = a.batch, a.channels, a.outputs, a.width, a.size
    pitch, border, table, taps, source, sums = a.pitch, a.border, a.table, a.taps, a.source, a.sums
    entries, entry_pitch, starts, start_pitch = a.entries, a.entry_pitch, a.starts, a.start_pitch
    matrix = a.scratch + count_threads(a, 1) * a.scratch_bytes
    spare = matrix + size * 4
    _clear(matrix, size)
    step = element_bytes(kind)
    height = outputs // width
    channel = take_tasks(a, 1)
    while channel < channels:
        for sample in range(batch):
            at = source + (sample * channels + channel) * outputs * step
            for row in range(height):
                to = matrix + (border + row * pitch) * 4
                whole = width // LANES * LANES
                for i in range(0, whole, LANES):
                    cast_load(kind, at + (row * width + i) * step, to + i * 4)
                if whole < width:
                    copy_bytes(at + (row * width + whole) * step, spare, (width - whole) * step)
                    cast_load(kind, spare, spare + VECTOR)
                    copy_bytes(spare + VECTOR, to + whole * 4, (width - whole) * 4)
            for i in range(get_i64(table), get_i64(table + 8)):
                tap, offset = get_i64(table + i * 16), get_i64(table + i * 16 + 8)
                _add_one(
                    entries + sample * entry_pitch,
                    starts + sample * start_pitch + (channel + 1) * 4,
                    1,
                    0,
                    0,
                    matrix + offset,
                    0,
                    sums + (channel * taps + tap) * VECTOR,
                )
        channel = take_tasks(a, 1)
