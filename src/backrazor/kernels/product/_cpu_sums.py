"""The matrix that entries look at, and the sums over them.

Shape legend: B samples, C/D input/output channels, P positions of the output, groups of 16 output channels.
"""

from __future__ import annotations

from numba import njit

from ..cpu.lanes import BF16, F16, F32, by_kind, cast_load, copy_bytes, element_bytes
from ..cpu.scalars import fetch_add, get_i64, put_f32
from ..cpu.vectors import LANES
from ._cpu_lanes import add_products, transpose_tile

VECTOR = LANES * 4
TILE_BYTES = LANES * VECTOR
MOST_VECTORS = 16  # that one pass over the entries adds to: half of the registers where they are longest

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
def _lay_worker(kind, block):
    """The gradient (B, D, P) as a matrix of rows of D, one a position, inside a border. A piece of work is a group of
    channels of a sample. The argument block is laid out by ``cpu._matrix``."""
    batch, groups, outputs = get_i64(block + 16), get_i64(block + 24), get_i64(block + 32)
    positions, width, pitch = get_i64(block + 40), get_i64(block + 48), get_i64(block + 56)
    border = get_i64(block + 64)  # rows of the matrix before the first position
    source, matrix, matrix_pitch = get_i64(block + 72), get_i64(block + 80), get_i64(block + 88)
    unit = get_i64(block + 96)
    stage = get_i64(block + 104) + fetch_add(block + 8, 1) * get_i64(block + 112)
    partial = stage + TILE_BYTES
    size = element_bytes(kind)
    task = fetch_add(block, 1)
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
        task = fetch_add(block, 1)


def lay_f32(block):
    _lay_worker(F32, block)


def lay_f16(block):
    _lay_worker(F16, block)


def lay_bf16(block):
    _lay_worker(BF16, block)


def add_sums(block):
    """Sums of ``cpu._add``, whose argument block it is. A piece of work is some input channels and one range of output
    channels."""
    channels, piece, ranges, groups = get_i64(block + 16), get_i64(block + 24), get_i64(block + 32), get_i64(block + 40)
    batch, entries, entry_pitch = get_i64(block + 48), get_i64(block + 56), get_i64(block + 64)
    starts, start_pitch = get_i64(block + 72), get_i64(block + 80)
    matrix, matrix_pitch, sums = get_i64(block + 88), get_i64(block + 96), get_i64(block + 104)
    classes, table, taps = get_i64(block + 112), get_i64(block + 120), get_i64(block + 128)
    pieces = (channels + piece - 1) // piece
    task = fetch_add(block, 1)
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
        task = fetch_add(block, 1)


@njit(forceinline=True)
def _depthwise_worker(kind, block):
    """Sums of ``cpu._add_depthwise``: a row of taps is one vector, and the gradient lies as it is, but for a border. A
    piece of work is a channel of all samples."""
    batch, channels, outputs, width = get_i64(block + 16), get_i64(block + 24), get_i64(block + 32), get_i64(block + 40)
    size, pitch, border = get_i64(block + 48), get_i64(block + 56), get_i64(block + 64)
    source, entries, entry_pitch = get_i64(block + 72), get_i64(block + 80), get_i64(block + 88)
    starts, start_pitch, sums = get_i64(block + 96), get_i64(block + 104), get_i64(block + 112)
    table, taps = get_i64(block + 120), get_i64(block + 128)
    matrix = get_i64(block + 136) + fetch_add(block + 8, 1) * get_i64(block + 144)
    spare = matrix + size * 4
    _clear(matrix, size)
    step = element_bytes(kind)
    height = outputs // width
    channel = fetch_add(block, 1)
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
        channel = fetch_add(block, 1)


def depthwise_f32(block):
    _depthwise_worker(F32, block)


def depthwise_f16(block):
    _depthwise_worker(F16, block)


def depthwise_bf16(block):
    _depthwise_worker(BF16, block)
