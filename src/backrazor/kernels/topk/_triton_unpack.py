"""The Triton kernels that unpack: every element of the dense output is written once, by one program, so nothing races
and nothing is cleared beforehand.

    count    how many kept elements each chunk of a sample has, from the index alone; only where the index is so long
             that ``expand`` had better not read all of it that lies before a chunk
    expand   where the chunk's values begin follows from what is kept before it; an element's own place from a scan over
             the block
    decode   no index: values back to their type

Both of the latter may end in an epilogue: (x_hat - mean) * rstd with a mean and a reciprocal deviation per row, so that
a norm's pruned input is normalised on its way out; or x_hat + guess, everywhere, where a mask of one bit per element
says so, or times what an activation's codes stand for.

Shape legend: B samples, n elements per sample, K kept, C chunks per sample, T = ceil(n / 256) tiles, r = row elements
per row of the epilogue.
"""

import triton
import triton.language as tl

from .._triton import from_float32, lanes_left, sum_before, to_float32
from ..guess._triton_guess import NO_GUESS, guessed, told
from ._triton_pack import BITMAP, TILE

STEP: tl.constexpr = tl.constexpr(256)  # tile offsets placed at a time


@triton.jit
def _tile_sizes(counts, full, sample, first, tiles, BLOCK: tl.constexpr):
    """Kept elements of the tiles of the block at ``first``, int32 (BLOCK / 256,); 0 past the last tile."""
    tile = tl.arange(0, BLOCK // TILE)  # of the block, which is eight: one byte of flags
    inside = tile < lanes_left(tiles, first // TILE, BLOCK // TILE)
    count = tl.load(counts + (sample * tiles + first // TILE) + tile, mask=inside, other=0).to(tl.int32)
    flags = tl.load(full + (sample * ((tiles + 7) // 8) + first // BLOCK)).to(tl.int32)
    return count + tl.where(inside & (((flags >> tile) & 1) == 1), TILE, 0)


@triton.jit
def _ones(bits):
    """Ones of each byte, int32."""
    bits = bits - ((bits >> 1) & 0x55)  # in pairs, in fours, in the byte
    bits = (bits & 0x33) + ((bits >> 2) & 0x33)
    return (bits + (bits >> 4)) & 0x0F


@triton.jit
def _kept_before(index, counts, full, sample, n, start, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """How many elements of a sample are kept before ``start``, a multiple of ``BLOCK``: read from the index by
    every program anew, which saves a launch of ``count``."""
    total = tl.zeros((256,), tl.int32)
    lane = tl.arange(0, 256)
    if INDEX == BITMAP:
        stop = (start // 8).to(tl.int32)
        row = index + sample * ((n + 7) // 8)
        for first in range(0, stop, 256):
            total += _ones(tl.load(row + first + lane, mask=first + lane < stop, other=0).to(tl.int32))
    else:
        stop = (start // TILE).to(tl.int32)
        tiles = (n + TILE - 1) // TILE
        for first in range(0, stop, 256):
            total += tl.load(counts + sample * tiles + first + lane, mask=first + lane < stop, other=0).to(tl.int32)
        flags = (start // BLOCK).to(tl.int32)  # a block is eight tiles: one byte of flags
        row = full + sample * ((tiles + 7) // 8)
        whole = tl.zeros((256,), tl.int32)
        for first in range(0, flags, 256):
            whole += _ones(tl.load(row + first + lane, mask=first + lane < flags, other=0).to(tl.int32))
        return tl.sum(total, axis=0) + tl.sum(whole, axis=0).to(tl.int64) * TILE
    return tl.sum(total, axis=0).to(tl.int64)


@triton.jit
def count(index, counts, full, n, chunk, chunks, chunk_counts, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    sample, number = (program // chunks).to(tl.int64), program % chunks
    start = number.to(tl.int64) * chunk
    stop = tl.minimum(start + chunk, n)
    if INDEX == BITMAP:
        total = tl.zeros((BLOCK // 8,), tl.int32)
        length = (n + 7) // 8
        byte = tl.arange(0, BLOCK // 8)
        for first in range(start, stop, BLOCK):
            inside = byte < lanes_left(length, first // 8, BLOCK // 8)
            bits = tl.load(index + (sample * length + first // 8) + byte, mask=inside, other=0).to(tl.int32)
            total += _ones(bits)
        tl.store(chunk_counts + program, tl.sum(total, axis=0))
    else:
        total = tl.zeros((BLOCK // TILE,), tl.int32)
        for first in range(start, stop, BLOCK):
            total += _tile_sizes(counts, full, sample, first, (n + TILE - 1) // TILE, BLOCK)
        tl.store(chunk_counts + program, tl.sum(total, axis=0))


@triton.jit
def _pitch(values, keep):
    """From one sample's stored values to the next's, in elements of ``values``."""
    return (keep + 1) // 2 if values.dtype.element_ty == tl.uint8 else keep


@triton.jit
def _decoded(values, scales, position, mask, dtype: tl.constexpr):
    """The stored value at ``position`` as ``dtype``, zero where the mask is off; 256 values share one of ``scales``."""
    if values.dtype.element_ty == tl.uint8:  # int4
        codes = tl.load(values + position // 2, mask=mask, other=0).to(tl.int32) >> (position % 2 * 4).to(tl.int32)
        exact = (((codes & 15) ^ 8) - 8).to(tl.float32)
    else:
        exact = to_float32(tl.load(values + position, mask=mask, other=0))
    if values.dtype.element_ty == tl.int8 or values.dtype.element_ty == tl.uint8:
        exact = exact * to_float32(tl.load(scales + position // TILE, mask=mask, other=0))
    return from_float32(exact, dtype)


@triton.jit
def _finished(
    values,
    scales,
    position,
    mask,
    mean,
    rstd,
    known,
    levels,
    sample,
    n,
    first,
    lane,
    row,
    inside,
    dtype: tl.constexpr,
    NORMALISE: tl.constexpr,
    GUESS: tl.constexpr,
    KNOWN: tl.constexpr,
):
    """What is written of a sample's elements ``first + lane``: ``values[position]`` where ``mask`` is on. With GUESS,
    ``mean`` and ``rstd`` are codes and scales of ``Guesses``, ``row`` is how many there are."""
    if GUESS != NO_GUESS:
        guess = guessed(mean, rstd, row, n, sample, first, lane, inside, GUESS)
        if KNOWN > 1:
            guess = guess * told(known, levels, n, sample, first, lane, inside, KNOWN)
        guess = to_float32(from_float32(guess, dtype))
        if KNOWN == 1:
            byte = sample * ((n + 7) // 8) + first // 8
            bits = tl.load(known + byte + lane // 8, mask=inside, other=0).to(tl.int32) >> (lane % 8)
            guess = tl.where((bits & 1) == 1, guess, 0.0)
        return from_float32(to_float32(_decoded(values, scales, position, mask, dtype)) + guess, dtype)
    elif NORMALISE:
        exact = _decoded(values, scales, position, mask, tl.float32)
        statistic = sample * (n // row) + first // row
        lane_row = ((first % row).to(tl.int32) + lane) // row  # row < 2^31 - 2^15: see the host's side
        centred = exact - tl.load(mean + statistic + lane_row, mask=inside, other=0)
        return from_float32(centred * tl.load(rstd + statistic + lane_row, mask=inside, other=0), dtype)
    else:
        return _decoded(values, scales, position, mask, dtype)


@triton.jit
def expand(
    values,  # as ``Stored`` says
    scales,  # (B, ceil(K / 256)), int8 and int4 only
    index,
    counts,
    full,
    mean,  # (B, n / r) float32, read if NORMALISE, as rstd is; if GUESS, codes and scales
    rstd,
    known,  # of KNOWN bits per element, read if there are any: one is a mask, more are codes of ``levels``
    levels,
    out,  # (B, n)
    n,
    keep,
    row,
    chunk,
    chunks,
    chunk_counts,  # (B, C) int32, read if COUNTED
    COUNTED: tl.constexpr,
    NORMALISE: tl.constexpr,
    GUESS: tl.constexpr,
    KNOWN: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample, number = (program // chunks).to(tl.int64), program % chunks
    runs = (keep + TILE - 1) // TILE
    start = number.to(tl.int64) * chunk
    if COUNTED:
        position = sum_before(chunk_counts + sample * chunks, number)
    else:
        position = _kept_before(index, counts, full, sample, n, start, INDEX, BLOCK)
    for first in range(start, tl.minimum(start + chunk, n), BLOCK):
        lane = tl.arange(0, BLOCK)
        inside = lane < lanes_left(n, first, BLOCK)
        if INDEX == BITMAP:
            byte = sample * ((n + 7) // 8) + first // 8
            ones = tl.load(index + byte + lane // 8, mask=inside, other=0).to(tl.int32)
            present = (ones >> (lane % 8)) & 1
        else:
            tiles = (n + TILE - 1) // TILE
            sizes = _tile_sizes(counts, full, sample, first, tiles, BLOCK)
            ends = tl.cumsum(sizes, 0)
            # a histogram of distinct places is the block's bitmap: the offsets of a tile ascend, so the scan below
            # restores their order
            present = tl.zeros((BLOCK,), tl.int32)
            for done in range(0, tl.sum(sizes, axis=0), STEP):
                entry = done + tl.arange(0, STEP)
                valid = entry < tl.sum(sizes, axis=0)
                offset = tl.load(index + sample * keep + position + entry, mask=valid, other=0).to(tl.int32)
                tile = tl.sum((ends[None, :] <= entry[:, None]).to(tl.int32), axis=1)
                present += tl.histogram(tl.where(valid, tile * TILE + offset, 0), BLOCK, mask=valid)
        rank = tl.cumsum(present, 0) - present
        value = _finished(
            values + sample * _pitch(values, keep),
            scales + sample * runs,
            position + rank,
            present == 1,
            mean,
            rstd,
            known,
            levels,
            sample,
            n,
            first,
            lane,
            row,
            inside,
            out.dtype.element_ty,
            NORMALISE,
            GUESS,
            KNOWN,
        )
        tl.store(out + (sample * n + first) + lane, value, mask=inside)
        position += tl.sum(present, axis=0)


@triton.jit
def decode(
    values,
    scales,
    mean,
    rstd,
    known,
    levels,
    out,
    keep,
    row,
    blocks,
    NORMALISE: tl.constexpr,
    GUESS: tl.constexpr,
    KNOWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    first = (program % blocks).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < lanes_left(keep, first, BLOCK)
    run = sample * ((keep + TILE - 1) // TILE) + first // TILE
    value = _finished(
        values + sample * _pitch(values, keep) + (first // 2 if values.dtype.element_ty == tl.uint8 else first),
        scales + run,
        lane,
        inside,
        mean,
        rstd,
        known,
        levels,
        sample,
        keep,
        first,
        lane,
        row,
        inside,
        out.dtype.element_ty,
        NORMALISE,
        GUESS,
        KNOWN,
    )
    tl.store(out + (sample * keep + first) + lane, value, mask=inside)
