"""How the K-th largest magnitude of a sample is found: two passes, or an exact radix selection.

Shape legend: n elements per sample, K kept.
"""

from __future__ import annotations

from numba import njit

from ..cpu.lanes import gather_magnitudes, magnitude_masks, valid_lanes
from ..cpu.layout import F32, LANES
from ..cpu.scalars import get_i32, get_u16, popcount, put_i32
from ..guess._cpu_guess import block_at
from ._cpu_form import BIN_BITS, BINS, MIN_SAMPLED


@njit(forceinline=True)
def _magnitude(kind, source, i):
    if kind == F32:
        return get_i32(source + i * 4) & 0x7FFFFFFF
    return get_u16(source + i * 2) & 0x7FFF


@njit(forceinline=True)
def _clear(histogram):
    for i in range(BINS):
        put_i32(histogram + i * 4, 0)


@njit(forceinline=True)
def _count(histogram, digit):
    slot = histogram + digit * 4
    put_i32(slot, get_i32(slot) + 1)


@njit(error_model="numpy")
def _kth_largest_int(values, count, rank, low, high, histogram):
    """(value, ties) of the rank-th largest of ``count`` int32 in [low, high] at ``values``; reorders the buffer.

    Radix selection from the highest bit that the interval leaves open, keeping only the matching entries after each
    digit. What is left of ``rank`` at the end is how many of the entries equal to the value belong to the ``rank``
    largest.
    """
    bits = 1
    while (high - low) >> bits:
        bits += 1
    shift = max(bits - BIN_BITS, 0)
    while True:
        _clear(histogram)
        for i in range(count):
            _count(histogram, ((get_i32(values + i * 4) - low) >> shift) & (BINS - 1))
        digit = BINS - 1
        while get_i32(histogram + digit * 4) < rank:
            rank -= get_i32(histogram + digit * 4)
            digit -= 1
        matching = 0
        for i in range(count):
            value = get_i32(values + i * 4)
            put_i32(values + matching * 4, value)  # final only if it matches: otherwise the next one lands on it
            if ((value - low) >> shift) & (BINS - 1) == digit:
                matching += 1
        count = matching
        if count == 1 or shift == 0:
            return get_i32(values), rank
        shift = max(shift - BIN_BITS, 0)


@njit(forceinline=True)
def _kth_largest_scan(kind, fill, guess, source, n, rank, histogram, spare):
    """(value, ties) of the rank-th largest magnitude by radix selection over the whole sample: three passes, no
    buffer."""
    prefix = 0
    shift = 31
    while shift > 0:
        step = min(BIN_BITS, shift)
        _clear(histogram)
        for block in range((n + LANES - 1) // LANES):
            address = block_at(kind, fill, guess, source, n, block, spare)
            for lane in range(min(LANES, n - block * LANES)):
                magnitude = _magnitude(kind, address, lane)
                if (magnitude >> shift) == (prefix >> shift):
                    _count(histogram, (magnitude >> (shift - step)) & ((1 << step) - 1))
        shift -= step
        digit = (1 << step) - 1
        while get_i32(histogram + digit * 4) < rank:
            rank -= get_i32(histogram + digit * 4)
            digit -= 1
        prefix |= digit << shift
    return prefix, rank


@njit(forceinline=True)
def _bin_at_rank(histogram, rank, shift):
    """The magnitude at which about ``rank`` sampled elements are larger, interpolated inside its bin."""
    digit = BINS - 1
    while digit > 0 and get_i32(histogram + digit * 4) < rank:
        rank -= get_i32(histogram + digit * 4)
        digit -= 1
    if digit == 0:
        return 0
    inside = get_i32(histogram + digit * 4)
    return (digit << shift) + ((inside - rank) << shift) // max(inside, 1)


@njit(forceinline=True)
def _interval(kind, fill, guess, source, n, keep, histogram, spare):
    """(low, high): an interval of magnitudes that almost surely holds the keep-th largest, from a fixed pseudo-random
    sample."""
    size = min(max(n >> 6, 1024), 4096)
    shift = (31 if kind == F32 else 15) - BIN_BITS
    _clear(histogram)
    state = 12345
    for _ in range(size):
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF  # stays below 2^62: signed overflow would be undefined
        i = (state * n) >> 31
        address = block_at(kind, fill, guess, source, n, i // LANES, spare)
        _count(histogram, _magnitude(kind, address, i & (LANES - 1)) >> shift)
    share = keep / n
    centre = share * size
    # the rank of the true threshold in the sample is binomial: three and a half standard deviations, and a little for
    # tiny shares
    spread = 3.5 * (centre * (1.0 - share)) ** 0.5 + 3.0
    high = 0x7FFFFFFF if centre - spread < 1.0 else _bin_at_rank(histogram, int(centre - spread), shift) + 1
    low = 0 if centre + spread >= size else _bin_at_rank(histogram, int(centre + spread) + 1, shift)
    return low, high


@njit(forceinline=True)
def threshold_of(kind, fill, guess, source, n, keep, histogram, buffer, capacity, spare):
    """(threshold, ties): the keep-th largest magnitude, and how many elements equal to it are kept (the first by
    index)."""
    if n < MIN_SAMPLED:
        return _kth_largest_scan(kind, fill, guess, source, n, keep, histogram, spare)
    low, high = _interval(kind, fill, guess, source, n, keep, histogram, spare)
    above = equal_high = equal_low = inside = 0
    for block in range((n + 15) // 16):
        address = block_at(kind, fill, guess, source, n, block, spare)
        valid = valid_lanes(n, block)
        above_high, at_high = magnitude_masks(kind, address, high)
        above_low, at_low = magnitude_masks(kind, address, low)
        above += popcount(above_high & valid)
        equal_high += popcount(at_high & valid)
        equal_low += popcount(at_low & valid)
        chosen = above_low & ~above_high & ~at_high & valid
        if inside + 16 > capacity:
            return _kth_largest_scan(kind, fill, guess, source, n, keep, histogram, spare)
        gather_magnitudes(kind, address, chosen, buffer + inside * 4)
        inside += popcount(chosen)
    rank = keep - above
    if 0 < rank <= equal_high:
        return high, rank
    rank -= equal_high
    if 0 < rank <= inside:
        return _kth_largest_int(buffer, inside, rank, low, high, histogram)
    rank -= inside
    if low < high and 0 < rank <= equal_low:
        return low, rank
    return _kth_largest_scan(kind, fill, guess, source, n, keep, histogram, spare)
