"""The Triton kernels that unpack: every element of the dense output is written once, by one program, so nothing races
and nothing is cleared beforehand.

    count    how many kept elements each chunk of a sample has, from the index alone
    expand   where the chunk's values begin follows from the counts before it; an element's own place from a scan over
             the block
    decode   no index: values back to their type

Both of the latter may end in an epilogue: (x_hat - mean) * rstd with a mean and a reciprocal deviation per row, so that
a norm's pruned input is normalised on its way out.

Shape legend: B samples, n elements per sample, K kept, C chunks per sample, T = ceil(n / 256) tiles, r = row elements
per row of the epilogue.
"""

import triton
import triton.language as tl

from .._triton import from_float32, sum_before, to_float32
from ._triton_pack import BITMAP, TILE

STEP: tl.constexpr = tl.constexpr(256)  # tile offsets placed at a time


@triton.jit
def _tile_sizes(counts, full, sample, tile, tiles):
    """Kept elements of each tile, int32; 0 past the last tile."""
    inside = tile < tiles
    count = tl.load(counts + sample * tiles + tile, mask=inside, other=0).to(tl.int32)
    flags = tl.load(full + sample * ((tiles + 7) // 8) + tile // 8, mask=inside, other=0).to(tl.int32)
    return count + TILE * ((flags >> (tile % 8)) & 1)


@triton.jit
def count(index, counts, full, n, chunk, chunks, chunk_counts, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    sample, number = (program // chunks).to(tl.int64), program % chunks
    start = number * chunk
    stop = tl.minimum(start + chunk, n)
    if INDEX == BITMAP:
        total = tl.zeros((BLOCK // 8,), tl.int32)
        length = (n + 7) // 8
        for first in range(start // 8, (stop + 7) // 8, BLOCK // 8):
            byte = first + tl.arange(0, BLOCK // 8)
            bits = tl.load(index + sample * length + byte, mask=byte < length, other=0).to(tl.int32)
            bits = bits - ((bits >> 1) & 0x55)  # ones in pairs, in fours, in the byte
            bits = (bits & 0x33) + ((bits >> 2) & 0x33)
            total += (bits + (bits >> 4)) & 0x0F
        tl.store(chunk_counts + program, tl.sum(total, axis=0))
    else:
        total = tl.zeros((BLOCK // TILE,), tl.int32)
        for first in range(start // TILE, (stop + TILE - 1) // TILE, BLOCK // TILE):
            total += _tile_sizes(counts, full, sample, first + tl.arange(0, BLOCK // TILE), (n + TILE - 1) // TILE)
        tl.store(chunk_counts + program, tl.sum(total, axis=0))


@triton.jit
def _decoded(values, scales, sample, keep, position, mask, dtype: tl.constexpr):
    """Stored values at ``position`` of a sample as ``dtype``, zero where the mask is off."""
    exact = to_float32(tl.load(values + sample * keep + position, mask=mask, other=0))
    if values.dtype.element_ty == tl.int8:
        runs = (keep + TILE - 1) // TILE
        exact = exact * to_float32(tl.load(scales + sample * runs + position // TILE, mask=mask, other=0))
    return from_float32(exact, dtype)


@triton.jit
def _finished(
    values, scales, mean, rstd, sample, n, keep, position, at, row, mask, inside, out, NORMALISE: tl.constexpr
):
    """What is written of the elements ``at`` of a sample; where ``mask`` is on they are stored at ``position``."""
    if NORMALISE:
        exact = _decoded(values, scales, sample, keep, position, mask, tl.float32)
        statistic = sample * (n // row) + at // row
        centred = exact - tl.load(mean + statistic, mask=inside, other=0)
        return from_float32(centred * tl.load(rstd + statistic, mask=inside, other=0), out.dtype.element_ty)
    else:
        return _decoded(values, scales, sample, keep, position, mask, out.dtype.element_ty)


@triton.jit
def expand(
    values,  # (B, K)
    scales,  # (B, ceil(K / 256)), int8 only
    index,
    counts,
    full,
    mean,  # (B, n / r) float32, read if NORMALISE, as rstd is
    rstd,
    out,  # (B, n)
    n,
    keep,
    row,
    chunk,
    chunks,
    chunk_counts,  # (B, C) int32
    NORMALISE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample, number = (program // chunks).to(tl.int64), program % chunks
    position = sum_before(chunk_counts + sample * chunks, number)
    start = number * chunk
    for first in range(start, tl.minimum(start + chunk, n), BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < n
        if INDEX == BITMAP:
            bits = tl.load(index + sample * ((n + 7) // 8) + at // 8, mask=inside, other=0).to(tl.int32)
            present = (bits >> (at % 8)) & 1
        else:
            tiles = (n + TILE - 1) // TILE
            sizes = _tile_sizes(counts, full, sample, first // TILE + tl.arange(0, BLOCK // TILE), tiles)
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
        place, mask = position + rank, present == 1
        value = _finished(values, scales, mean, rstd, sample, n, keep, place, at, row, mask, inside, out, NORMALISE)
        tl.store(out + sample * n + at, value, mask=inside)
        position += tl.sum(present, axis=0)


@triton.jit
def decode(values, scales, mean, rstd, out, keep, row, blocks, NORMALISE: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    at = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = at < keep
    value = _finished(values, scales, mean, rstd, sample, keep, keep, at, at, row, inside, inside, out, NORMALISE)
    tl.store(out + sample * keep + at, value, mask=inside)
