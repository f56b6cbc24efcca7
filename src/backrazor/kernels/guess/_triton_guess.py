"""The Triton kernels of guesses: means of rows, and what the packing and unpacking kernels do with them per element.

Shape legend: B samples, n elements per sample, R rows of m elements.
"""

import triton
import triton.language as tl

from .._triton import from_float32, lanes_left, to_float32
from ..topk.layout import TILE as TILE_ELEMENTS
from . import layout

TILE: tl.constexpr = tl.constexpr(TILE_ELEMENTS)
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
def without(x, codes, code_scales, rows, low, high, n, sample, first, lane, inside, GUESS: tl.constexpr):
    """A sample's elements ``first + lane`` less their guesses, of x's type."""
    value = tl.load(x + (sample * n + first) + lane, mask=inside, other=0)
    if GUESS != NO_GUESS:
        exact = to_float32(value)
        guess = guessed(codes, code_scales, rows, n, sample, first, lane, inside, GUESS)
        outside = (exact <= low) | (exact >= high)
        return from_float32(exact - tl.where(outside, 0.0, guess), x.dtype.element_ty)
    else:
        return value


@triton.jit
def average_rows(x, means, low, high, length, BLOCK: tl.constexpr):
    """x (B * R, m) -> ``means`` (B * R) float32, over the elements between the limits. A program has a row."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    many = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, length, BLOCK):
        lane = tl.arange(0, BLOCK)
        inside = lane < length - first
        value = to_float32(tl.load(x + row * length + first + lane, mask=inside, other=0))
        counted = inside & ~((value <= low) | (value >= high))
        total += tl.where(counted, value, 0.0)
        many += counted.to(tl.float32)
    mean = tl.div_rn(tl.sum(total, axis=0), tl.maximum(tl.sum(many, axis=0), 1.0))
    tl.store(means + row, mean)


@triton.jit
def average_features(x, means, low, high, length, rows, blocks, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """x (B, m, R) -> ``means`` (B, R) float32, over the elements between the limits. A program has ``BLOCK`` features
    of a sample."""
    program = tl.program_id(0)
    sample, number = (program // blocks).to(tl.int64), program % blocks
    start = number.to(tl.int64) * BLOCK
    feature = tl.arange(0, BLOCK)
    present = feature < lanes_left(rows, start, BLOCK)
    token = tl.arange(0, TOKENS)
    offset = token.to(tl.int64)[:, None] * rows + feature[None, :]
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    many = tl.zeros((TOKENS, BLOCK), tl.float32)
    for first in range(0, length, TOKENS):
        inside = (token < length - first)[:, None] & present[None, :]
        at = (sample * length + first) * rows + start
        value = to_float32(tl.load(x + at + offset, mask=inside, other=0))
        counted = inside & ~((value <= low) | (value >= high))
        total += tl.where(counted, value, 0.0)
        many += counted.to(tl.float32)
    mean = tl.div_rn(tl.sum(total, axis=0), tl.maximum(tl.sum(many, axis=0), 1.0))
    tl.store(means + sample * rows + start + feature, mean, mask=present)
