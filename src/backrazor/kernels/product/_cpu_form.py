"""What the kernels of a product are told."""

from __future__ import annotations

from ..cpu.arguments import arguments
from ..cpu.layout import LANES
from ..topk._cpu_form import Form

VECTOR = LANES * 4
TILE_BYTES = LANES * VECTOR
MOST_VECTORS = 16  # that one pass over the entries adds to: half of the registers where they are longest
# Rows of the matrix that one look at a table covers, and how many tables lie in the cache at a time.
NIBBLE, TABLES = 4, 8
SUBSETS = 1 << NIBBLE
BLOCK = NIBBLE * TABLES
TABLE_VECTORS = 2  # per subset, where there are as many
# How positions are grouped: by channel, which is the order they have; by channel and the remainders of height and width
# by the strides; by input of a Linear.
CHANNELS, STRIDED, INPUTS = 0, 1, 2


@arguments
class MakeEntries(Form):
    """A packed batch, how its positions count, and where its entries go; pitches in bytes, from a sample to the
    next."""

    entries: int
    entry_pitch: int
    starts: int
    start_pitch: int
    order: int  # CHANNELS, STRIDED or INPUTS
    buckets: int
    height: int
    width: int
    down: int  # strides
    across: int
    pitch: int  # rows of the matrix from one line of positions to the next
    unit: int  # bytes of a row of the matrix
    scratch: int
    scratch_bytes: int  # of one thread


class Entries:
    """Fields that say where the entries of a batch lie; pitches in bytes, from a sample to the next."""

    entries: int
    entry_pitch: int
    starts: int
    start_pitch: int


@arguments
class Lay:
    """A gradient and the matrix it becomes."""

    batch: int
    groups: int
    outputs: int
    positions: int
    width: int
    pitch: int  # rows of the matrix from one line of positions to the next
    border: int  # rows of the matrix before the first position
    source: int
    matrix: int
    matrix_pitch: int  # bytes from a sample to the next
    unit: int  # bytes of a row
    scratch: int
    scratch_bytes: int  # of one thread


@arguments
class Add(Entries):
    """Entries, the matrix they look at and the sums they belong to."""

    batch: int
    channels: int
    piece: int  # channels that a thread takes at a time
    ranges: int
    groups: int
    matrix: int
    matrix_pitch: int
    sums: int
    classes: int
    table: int  # of taps by class
    taps: int


@arguments
class Spread:
    """Bits of a batch, (B, C, H, W) in logical order, and the strings that they become: one per channel and class, in
    the order of the rows that the tap without a shift looks at."""

    batch: int
    channels: int
    height: int
    width: int
    down: int  # strides
    across: int
    pitch: int  # rows of the matrix from one line of positions to the next
    front: int  # zero bits before the first
    source: int
    source_pitch: int  # bytes from a sample to the next
    strings: int
    string_bytes: int


@arguments
class AddMasked:
    """Strings of bits, a number per sample and channel, the matrix that they select rows of, and the sums."""

    batch: int
    channels: int
    piece: int  # channels that a thread takes at a time
    groups: int
    rows: int  # of the matrix, in whole blocks
    matrix: int
    matrix_pitch: int  # bytes from a sample to the next
    unit: int  # bytes of a row
    front: int
    strings: int
    string_bytes: int
    numbers: int
    sums: int
    classes: int
    table: int  # of taps by class, with shifts in rows
    taps: int
    scratch: int
    scratch_bytes: int  # of one thread


@arguments
class AddDepthwise(Entries):
    """Entries, the gradient they look at as it comes, and the sums they belong to."""

    batch: int
    channels: int
    outputs: int
    width: int
    size: int  # floats of a channel of the gradient inside its border
    pitch: int
    border: int
    source: int
    sums: int
    table: int
    taps: int
    scratch: int
    scratch_bytes: int  # of one thread
