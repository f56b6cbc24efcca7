"""The Triton kernels of guesses: means of rows, and what the packing and unpacking kernels do with them per element.

Shape legend: B samples, n elements per sample, R rows of m elements.
"""

import triton
import triton.language as tl

from .._triton import from_float32, lanes_left, to_float32
from ..topk.layout import TILE as TILE_ELEMENTS
from . import layout

TILE: tl.constexpr = tl.constexpr(TILE_ELEMENTS)
SMALLEST: tl.constexpr = tl.constexpr(layout.SMALLEST)
NO_GUESS: tl.constexpr = tl.constexpr(layout.NO_GUESS)
FEATURES: tl.constexpr = tl.constexpr(layout.FEATURES)


@triton.jit
def guessed(codes, code_scales, rows, n, sample, first, lane, inside, GUESS: tl.constexpr):
    """The guesses at a sample's elements ``first + lane``, float32."""
    place = (first + lane).to(tl.int32)  # n < 2^31 - 2^15: see the host's side
    row = place % rows if GUESS == FEATURES else place // (n // rows)
    code = tl.load(codes + sample * rows + row, mask=inside, other=0)
    runs = (rows + TILE - 1) // TILE
    scale = tl.load(code_scales + sample * runs + row // TILE, mask=inside, other=0)
    return code.to(tl.float32) * to_float32(scale)


@triton.jit
def told(known, levels, n, sample, first, lane, inside, KNOWN: tl.constexpr):
    """What the codes of ``KNOWN`` bits of a sample's elements ``first + lane`` stand for, float32."""
    PER: tl.constexpr = 8 // KNOWN
    place = first + lane
    codes = tl.load(known + sample * ((n + PER - 1) // PER) + place // PER, mask=inside, other=0).to(tl.int32)
    shift = tl.where(place % 2 == 1, KNOWN, 0)
    if KNOWN == 2:
        shift += tl.where(place % 4 >= 2, 4, 0)
    return tl.load(levels + ((codes >> shift) & ((1 << KNOWN) - 1)))


@triton.jit
def without(
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
    first,
    lane,
    inside,
    GUESS: tl.constexpr,
    KNOWN: tl.constexpr,
):
    """A sample's elements ``first + lane`` less their guesses, of x's type."""
    value = tl.load(x + (sample * n + first) + lane, mask=inside, other=0)
    if GUESS != NO_GUESS:
        exact = to_float32(value)
        guess = guessed(codes, code_scales, rows, n, sample, first, lane, inside, GUESS)
        if KNOWN > 0:
            guess = guess * told(known, levels, n, sample, first, lane, inside, KNOWN)
        outside = (exact <= low) | (exact >= high)
        return from_float32(exact - tl.where(outside, 0.0, guess), x.dtype.element_ty)
    else:
        return value


@triton.jit
def _weighed(value, low, high, known, levels, n, sample, first, lane, inside, KNOWN: tl.constexpr):
    """(what elements add to a row's total, what to its count), float32: themselves and one between the limits, or
    with ``KNOWN`` the products of least squares."""
    if KNOWN > 0:
        level = tl.where(inside, told(known, levels, n, sample, first, lane, inside, KNOWN), 0.0)
        return value * level, level * level
    else:
        counted = inside & ~((value <= low) | (value >= high))
        return tl.where(counted, value, 0.0), counted.to(tl.float32)


@triton.jit
def _quotient(total, many, KNOWN: tl.constexpr):
    return tl.div_rn(total, tl.maximum(many, SMALLEST if KNOWN > 0 else 1.0))


@triton.jit
def average_rows(x, means, low, high, known, levels, length, rows, BLOCK: tl.constexpr, KNOWN: tl.constexpr):
    """x (B * R, m) -> ``means`` (B * R) float32, over the elements between the limits; with ``KNOWN`` the factors of
    what their codes stand for. A program has a row."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    many = tl.zeros((BLOCK,), tl.float32)
    n = tl.full((), 0, tl.int64) + rows
    n *= length
    for first in range(0, length, BLOCK):
        lane = tl.arange(0, BLOCK)
        inside = lane < length - first
        value = to_float32(tl.load(x + row * length + first + lane, mask=inside, other=0))
        start = row % rows * length + first
        part, one = _weighed(value, low, high, known, levels, n, row // rows, start, lane, inside, KNOWN)
        total += part
        many += one
    tl.store(means + row, _quotient(tl.sum(total, axis=0), tl.sum(many, axis=0), KNOWN))


@triton.jit
def average_features(
    x,
    means,
    low,
    high,
    known,
    levels,
    length,
    rows,
    blocks,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    KNOWN: tl.constexpr,
):
    """x (B, m, R) -> ``means`` (B, R) float32, as ``average_rows``. A program has ``BLOCK`` features of a sample."""
    program = tl.program_id(0)
    sample, number = (program // blocks).to(tl.int64), program % blocks
    start = number.to(tl.int64) * BLOCK
    feature = tl.arange(0, BLOCK)
    present = feature < lanes_left(rows, start, BLOCK)
    token = tl.arange(0, TOKENS)
    offset = token.to(tl.int64)[:, None] * rows + feature[None, :]
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    many = tl.zeros((TOKENS, BLOCK), tl.float32)
    n = tl.full((), 0, tl.int64) + rows
    n *= length
    for first in range(0, length, TOKENS):
        inside = (token < length - first)[:, None] & present[None, :]
        at = (sample * length + first) * rows + start
        value = to_float32(tl.load(x + at + offset, mask=inside, other=0))
        within = (tl.full((), 0, tl.int64) + first) * rows + start
        part, one = _weighed(value, low, high, known, levels, n, sample, within, offset, inside, KNOWN)
        total += part
        many += one
    mean = _quotient(tl.sum(total, axis=0), tl.sum(many, axis=0), KNOWN)
    tl.store(means + sample * rows + start + feature, mean, mask=present)
