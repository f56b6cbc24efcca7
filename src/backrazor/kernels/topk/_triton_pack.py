"""The Triton kernels that pack: selection of each sample's K-th largest magnitude, compaction, quantisation.

The threshold is found by radix selection over the bits of |x|, the highest digit first. A program owns a *chunk* of one
sample, a sample has as many chunks as fill the device, and a launch depends only on what earlier launches have written:

    count_digits   once per digit: counts a chunk's elements by their digit, of those that share the digits found so far
        with the threshold. The first thing
                   a program does is to find the previous digit from the sample's counts: all its programs find the
                   same.
    tally          the last digit; how many elements of each chunk are larger than the threshold, and how many equal
    emit           compaction: where a chunk's values go follows from the tallies of the chunks before it
    pack_sample    all of this for a small sample, by one program

The last digit is counted a chunk at a time, and the elements above the digits before it are counted alongside, so that
the tallies cost no further read of
the tensor: float32 is read 3 times to select (digits of 11, 11 and 9 bits) and once to emit, 16-bit types 2 times (8
and 7 bits) and once.

Races: the only memory that two programs of one launch write is the samples' digit counts, the status flag and nothing
else. Both are atomic, integer, and commutative (a sum, an or), so the order of programs cannot show. Prefix and rank
pass from launch to launch in a slot of their own, written by the sample's first chunk alone and read only by later
launches. A value's place is counted, not drawn from an atomic counter, so it is the same in every run.

Shape legend: B samples, n elements per sample, K kept, C chunks per sample, S = 3 slots of state.
"""

import triton
import triton.language as tl

from .._triton import (
    INFINITY,
    from_float32,
    lanes_left,
    magnitude,
    quantise,
    scale_of,
    sum_before,
    to_float32,
)
from ..guess._triton_guess import without
from . import layout

SLOTS: tl.constexpr = tl.constexpr(layout.SLOTS)
TILE: tl.constexpr = tl.constexpr(layout.TILE)
BITMAP: tl.constexpr = tl.constexpr(layout.BITMAP)
TILES: tl.constexpr = tl.constexpr(layout.TILES)
NON_FINITE: tl.constexpr = tl.constexpr(layout.NON_FINITE)
OVERFLOW: tl.constexpr = tl.constexpr(layout.OVERFLOW)
INT8_LIMIT: tl.constexpr = tl.constexpr(float(layout.INT8_LIMIT))
INT4_LIMIT: tl.constexpr = tl.constexpr(float(layout.INT4_LIMIT))


@triton.jit
def _pick(counts, rank, BINS: tl.constexpr):
    """(digit, rank inside it) of the ``rank``-th largest of the elements that ``counts`` (BINS,) counts by digit."""
    bins = tl.arange(0, BINS)
    reaching = tl.sum(counts, axis=0) - tl.cumsum(counts, 0) + counts  # elements with this digit or a larger
    digit = tl.sum((reaching >= rank).to(tl.int32), axis=0) - 1
    larger = tl.sum(tl.where(bins == digit, reaching - counts, 0), axis=0)
    return digit, rank - larger


@triton.jit
def count_digits(
    x,  # (B, n)
    codes,  # of ``Guesses``, read if GUESS; with the limits, and what KNOWN bits tell of each element
    code_scales,
    rows,
    low,
    high,
    known,
    levels,
    n,
    keep,
    chunk,
    chunks,
    state,  # (B, S, 2) int32: prefix and rank after each digit
    before,  # (B, BEFORE_BINS) int32: counts of the digit before
    counts,  # (B, BINS) int32, zero at first
    chunk_counts,  # (B, C, BINS) int32: written with the last digit
    chunk_larger,  # (B, C) int32: written with the last digit
    DIGIT: tl.constexpr,
    LAST: tl.constexpr,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    BEFORE_BINS: tl.constexpr,
    GUESS: tl.constexpr,
    KNOWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample, number = (program // chunks).to(tl.int64), program % chunks
    prefix = 0
    if DIGIT > 0:
        rank = keep
        if DIGIT > 1:
            slot = state + (sample * SLOTS + (DIGIT - 2)) * 2
            prefix = tl.load(slot)
            rank = tl.load(slot + 1)
        digit, rank = _pick(tl.load(before + sample * BEFORE_BINS + tl.arange(0, BEFORE_BINS)), rank, BEFORE_BINS)
        prefix = prefix * BEFORE_BINS + digit
        if number == 0:
            slot = state + (sample * SLOTS + (DIGIT - 1)) * 2
            tl.store(slot, prefix)
            tl.store(slot + 1, rank)
    histogram = tl.zeros((BINS,), tl.int32)
    larger = tl.zeros((BLOCK,), tl.int32)
    start = number.to(tl.int64) * chunk
    for first in range(start, tl.minimum(start + chunk, n), BLOCK):
        lane = tl.arange(0, BLOCK)
        inside = lane < lanes_left(n, first, BLOCK)
        value = without(
            x, codes, code_scales, rows, low, high, known, levels, n, sample, first, lane, inside, GUESS, KNOWN
        )
        key = magnitude(value) >> SHIFT
        if DIGIT > 0:
            if LAST:
                larger += (inside & (key // BINS > prefix)).to(tl.int32)
            inside = inside & (key // BINS == prefix)
        histogram += tl.histogram(key & (BINS - 1), BINS, mask=inside)
    bins = tl.arange(0, BINS)
    tl.atomic_add(counts + sample * BINS + bins, histogram, mask=histogram > 0, sem="relaxed")
    if LAST:
        tl.store(chunk_counts + program.to(tl.int64) * BINS + bins, histogram)
        tl.store(chunk_larger + program, tl.sum(larger, axis=0))


@triton.jit
def tally(state, counts, chunk_counts, chunk_larger, chunk_equal, chunks, DIGITS: tl.constexpr, BINS: tl.constexpr):
    """The last digit, so the threshold, and what each chunk holds above it and at it; slot DIGITS - 1 gets (threshold,
    ties to keep)."""
    program = tl.program_id(0)
    sample = (program // chunks).to(tl.int64)
    slot = state + (sample * SLOTS + (DIGITS - 2)) * 2
    prefix = tl.load(slot)
    bins = tl.arange(0, BINS)
    digit, ties = _pick(tl.load(counts + sample * BINS + bins), tl.load(slot + 1), BINS)
    own = tl.load(chunk_counts + program.to(tl.int64) * BINS + bins)
    larger = tl.load(chunk_larger + program) + tl.sum(tl.where(bins > digit, own, 0), axis=0)
    tl.store(chunk_larger + program, larger)
    tl.store(chunk_equal + program, tl.sum(tl.where(bins == digit, own, 0), axis=0))
    if program % chunks == 0:
        tl.store(slot + 2, prefix * BINS + digit)
        tl.store(slot + 3, ties)


@triton.jit
def _status_of(value, stored, kept):
    """Status bits of float32 values and what became of them, int32."""
    finite = magnitude(value) < INFINITY
    overflowed = finite & (magnitude(to_float32(stored)) == INFINITY)
    return tl.where(kept, tl.where(finite, tl.where(overflowed, OVERFLOW, 0), NON_FINITE), 0)


@triton.jit
def _raise_flag(flag, seen):
    """Or the status bits of all elements into the flag; touches it only where there are any."""
    status = tl.max(seen & NON_FINITE, axis=0) | tl.max(seen & OVERFLOW, axis=0)
    tl.atomic_or(flag, status, mask=status != 0, sem="relaxed")


@triton.jit
def _write_kept(
    x,
    codes,
    code_scales,
    rows,
    low,
    high,
    known,
    levels,
    n,
    keep,
    sample,
    start,
    stop,
    threshold,
    ties,
    written,
    values,
    index,
    counts,
    full,
    flag,
    GUESS: tl.constexpr,
    KNOWN: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compaction of a sample's elements from ``start`` to ``stop``: those larger than the threshold and the first
    ``ties`` of those equal to it. ``written`` values of the sample lie before them."""
    seen = tl.zeros((BLOCK,), tl.int32)
    for first in range(start, stop, BLOCK):
        lane = tl.arange(0, BLOCK)
        inside = lane < lanes_left(n, first, BLOCK)
        value = without(
            x, codes, code_scales, rows, low, high, known, levels, n, sample, first, lane, inside, GUESS, KNOWN
        )
        key = magnitude(value)
        larger = (inside & (key > threshold)).to(tl.int32)
        equal = (inside & (key == threshold)).to(tl.int32)
        both = (larger << 16) + equal  # one scan for two counts: a block has fewer than 2^15 elements
        running = tl.cumsum(both, 0)
        equal_rank = (running & 0xFFFF) - equal
        kept = tl.where(equal_rank < ties, larger | equal, larger)
        place = written + (running >> 16) - larger + tl.minimum(equal_rank, ties)
        exact = to_float32(value)
        stored = from_float32(exact, values.dtype.element_ty)
        seen |= _status_of(exact, stored, kept == 1)
        tl.store(values + sample * keep + place, stored, mask=kept == 1)
        if INDEX == BITMAP:
            byte = tl.arange(0, BLOCK // 8)
            packed = tl.sum(tl.reshape(kept, (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :], axis=1)
            length = (n + 7) // 8
            written_bytes = byte < lanes_left(length, first // 8, BLOCK // 8)
            tl.store(index + (sample * length + first // 8) + byte, packed.to(tl.uint8), mask=written_bytes)
        if INDEX == TILES:
            tl.store(index + sample * keep + place, (lane % TILE).to(tl.uint8), mask=kept == 1)
            tiles = (n + TILE - 1) // TILE
            tile = tl.arange(0, BLOCK // TILE)
            count = tl.sum(tl.reshape(kept, (BLOCK // TILE, TILE)), axis=1)
            inside_tiles = tile < lanes_left(tiles, first // TILE, BLOCK // TILE)
            tl.store(counts + (sample * tiles + first // TILE) + tile, count.to(tl.uint8), mask=inside_tiles)
            whole = tl.sum((count == TILE).to(tl.int32) << tile, axis=0)  # a block is eight tiles: one byte of flags
            tl.store(full + sample * ((tiles + 7) // 8) + first // BLOCK, whole.to(tl.uint8))
        total = tl.sum(both, axis=0)
        written += (total >> 16) + tl.minimum(total & 0xFFFF, ties)
        ties = tl.maximum(ties - (total & 0xFFFF), 0)
    _raise_flag(flag, seen)


@triton.jit
def _quantise_block(x, values, scales, keep, sample, first, RUNS: tl.constexpr):
    """``RUNS`` whole runs of a sample, from run ``first`` (int64) on, to int8, or int4 where ``values`` are bytes, and
    their scales; returns status bits."""
    INT4: tl.constexpr = values.dtype.element_ty == tl.uint8
    LIMIT: tl.constexpr = INT4_LIMIT if INT4 else INT8_LIMIT
    run = tl.arange(0, RUNS)
    lane = run[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = lane < lanes_left(keep, first * TILE, RUNS * TILE)
    at = sample * keep + first * TILE
    value = to_float32(tl.load(x + at + lane, mask=inside, other=0))
    largest = tl.max(magnitude(value), axis=1)
    scale, inverse = scale_of(largest, LIMIT, scales.dtype.element_ty)
    quantised = quantise(value, inverse[:, None], LIMIT, 0.0)
    if INT4:
        pairs = tl.reshape(quantised & 15, (RUNS, TILE // 2, 2))
        packed = tl.sum(pairs << (4 * tl.arange(0, 2))[None, None, :], axis=2)
        byte = run[:, None] * (TILE // 2) + tl.arange(0, TILE // 2)[None, :]
        length = (keep + 1) // 2
        inside_bytes = byte < lanes_left(length, first * (TILE // 2), RUNS * (TILE // 2))
        tl.store(values + sample * length + first * (TILE // 2) + byte, packed.to(tl.uint8), mask=inside_bytes)
    else:
        tl.store(values + at + lane, quantised.to(tl.int8), mask=inside)
    runs = (keep + TILE - 1) // TILE
    owned = run < lanes_left(runs, first, RUNS)
    tl.store(scales + (sample * runs + first) + run, scale, mask=owned)
    return _status_of(largest.to(tl.float32, bitcast=True), scale, owned)


@triton.jit
def emit(
    x,  # (B, n)
    codes,  # of ``Guesses``, read if GUESS; with the limits, and what KNOWN bits tell of each element
    code_scales,
    rows,
    low,
    high,
    known,
    levels,
    n,
    keep,
    chunk,
    chunks,
    state,  # (B, S, 2)
    chunk_larger,  # (B, C)
    chunk_equal,  # (B, C)
    values,  # (B, K)
    index,  # by INDEX, as ``Stored`` says; counts and full likewise
    counts,
    full,
    flag,
    SLOT: tl.constexpr,
    GUESS: tl.constexpr,
    KNOWN: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a chunk's kept values and their index. Of the elements equal to the threshold the first ``ties`` of the
    sample are kept."""
    program = tl.program_id(0)
    sample, number = (program // chunks).to(tl.int64), program % chunks
    threshold = tl.load(state + (sample * SLOTS + SLOT) * 2)
    ties = tl.load(state + (sample * SLOTS + SLOT) * 2 + 1)
    equal_before = sum_before(chunk_equal + sample * chunks, number)
    written = sum_before(chunk_larger + sample * chunks, number) + tl.minimum(equal_before, ties)
    ties = tl.maximum(ties - equal_before, 0)
    start = number.to(tl.int64) * chunk
    stop = tl.minimum(start + chunk, n)
    _write_kept(
        x,
        codes,
        code_scales,
        rows,
        low,
        high,
        known,
        levels,
        n,
        keep,
        sample,
        start,
        stop,
        threshold,
        ties,
        written,
        values,
        index,
        counts,
        full,
        flag,
        GUESS,
        KNOWN,
        INDEX,
        BLOCK,
    )


@triton.jit
def _next_digit(
    x,
    codes,
    code_scales,
    rows,
    low,
    high,
    known,
    levels,
    n,
    sample,
    prefix,
    rank,
    FIRST: tl.constexpr,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    GUESS: tl.constexpr,
    KNOWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(prefix with the digit that begins at bit ``SHIFT``, rank among the elements that share it) of one sample."""
    histogram = tl.zeros((BINS,), tl.int32)
    for first in range(0, n, BLOCK):
        lane = tl.arange(0, BLOCK)
        inside = lane < lanes_left(n, first, BLOCK)
        value = without(
            x, codes, code_scales, rows, low, high, known, levels, n, sample, first, lane, inside, GUESS, KNOWN
        )
        key = magnitude(value) >> SHIFT
        if not FIRST:
            inside = inside & (key // BINS == prefix)
        histogram += tl.histogram(key & (BINS - 1), BINS, mask=inside)
    digit, rank = _pick(histogram, rank, BINS)
    return prefix * BINS + digit, rank


@triton.jit
def pack_sample(
    x,  # (B, n)
    codes,  # of ``Guesses``, read if GUESS; with the limits, and what KNOWN bits tell of each element
    code_scales,
    rows,
    low,
    high,
    known,
    levels,
    n,
    keep,
    values,  # (B, K); of INTEGERS those on their way, of x's type
    index,  # by INDEX, as ``Stored`` says; counts and full likewise
    counts,
    full,
    quantised,  # int8 or int4, as ``Stored`` says, and their scales, written if INTEGERS
    scales,
    flag,
    HIGH: tl.constexpr,
    MIDDLE: tl.constexpr,
    LOW: tl.constexpr,
    INTEGERS: tl.constexpr,
    RUNS: tl.constexpr,
    GUESS: tl.constexpr,
    KNOWN: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Selection, compaction and quantisation of a whole sample by one program, in one launch. ``HIGH``, ``MIDDLE`` and
    ``LOW`` are the bits of each digit, the highest first; 16-bit types have no middle one."""
    sample = tl.program_id(0).to(tl.int64)
    threshold, rank = _next_digit(
        x,
        codes,
        code_scales,
        rows,
        low,
        high,
        known,
        levels,
        n,
        sample,
        0,
        keep,
        True,
        MIDDLE + LOW,
        1 << HIGH,
        GUESS,
        KNOWN,
        BLOCK,
    )
    if MIDDLE > 0:
        threshold, rank = _next_digit(
            x,
            codes,
            code_scales,
            rows,
            low,
            high,
            known,
            levels,
            n,
            sample,
            threshold,
            rank,
            False,
            LOW,
            1 << MIDDLE,
            GUESS,
            KNOWN,
            BLOCK,
        )
    threshold, rank = _next_digit(
        x,
        codes,
        code_scales,
        rows,
        low,
        high,
        known,
        levels,
        n,
        sample,
        threshold,
        rank,
        False,
        0,
        1 << LOW,
        GUESS,
        KNOWN,
        BLOCK,
    )
    none = tl.full((), 0, tl.int32)
    _write_kept(
        x,
        codes,
        code_scales,
        rows,
        low,
        high,
        known,
        levels,
        n,
        keep,
        sample,
        0,
        n,
        threshold,
        rank,
        none,
        values,
        index,
        counts,
        full,
        flag,
        GUESS,
        KNOWN,
        INDEX,
        BLOCK,
    )
    if INTEGERS:
        tl.debug_barrier()  # what the program's other threads wrote is read below
        for first in range(0, (keep + TILE - 1) // TILE, RUNS):
            status = _quantise_block(values, quantised, scales, keep, sample, tl.full((), 0, tl.int64) + first, RUNS)
            _raise_flag(flag, status)


@triton.jit
def cast(x, values, flag, total, BLOCK: tl.constexpr):
    """All elements are kept: values = x in another type."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    inside = at < total - first
    exact = to_float32(tl.load(x + first + at, mask=inside, other=0))
    stored = from_float32(exact, values.dtype.element_ty)
    tl.store(values + first + at, stored, mask=inside)
    _raise_flag(flag, _status_of(exact, stored, inside))


@triton.jit
def quantise_runs(x, values, scales, flag, keep, blocks, RUNS: tl.constexpr):
    """(B, K) -> int8 or int4 and a bfloat16 scale for each run of 256. A program owns ``RUNS`` whole runs of one
    sample."""
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    first = (program % blocks).to(tl.int64) * RUNS
    _raise_flag(flag, _quantise_block(x, values, scales, keep, sample, first, RUNS))
