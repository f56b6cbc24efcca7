"""The case table: a case is a row. Rows are crossed with codec, type, sparsity, layout and what requires a gradient."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn


class Case(NamedTuple):
    """A layer that prunes its input: what builds it, and an input shape, samples first (1-d: one sample)."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


def _conv(*sizes: int, **settings: object) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*sizes, **settings)


def _linear(inputs: int, outputs: int, bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(inputs, outputs, bias)


def _conv_same(*sizes: int, **settings: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from timm.layers import Conv2dSame

        return Conv2dSame(*sizes, **settings)

    return build


PRUNING: dict[str, Case] = {
    "linear": Case(_linear(123, 7), (5, 123)),
    "linear, no bias": Case(_linear(16, 5, bias=False), (4, 16)),
    "linear over tokens": Case(_linear(123, 7), (5, 7, 123)),
    "linear over a grid": Case(_linear(9, 4), (3, 2, 5, 9)),
    "linear over a long sample": Case(_linear(384, 6), (3, 41, 384)),
    "linear of a vector": Case(_linear(123, 7), (123,)),
    "linear of one number": Case(_linear(1, 1), (5, 1)),
    "linear of an empty batch": Case(_linear(8, 3), (0, 8)),
    "conv 1x1 by matrix products": Case(_conv(7, 5, 1), (3, 7, 12, 13)),
    "conv 1x1": Case(_conv(7, 5, 1), (3, 7, 6, 5)),
    "conv 1x1 with few outputs": Case(_conv(8, 3, 1), (3, 8, 12, 13)),
    "conv 1x1 over a large map": Case(_conv(7, 5, 1), (2, 7, 33, 30)),
    "conv over a large map": Case(_conv(3, 4, 3, stride=2, padding=1), (2, 3, 61, 60)),
    "conv, depthwise over a large map": Case(_conv(7, 7, 3, padding=1, groups=7), (2, 7, 33, 30)),
    "conv, depthwise with five columns": Case(_conv(5, 5, 5, padding=2, groups=5), (2, 5, 9, 11)),
    "conv, padding and stride": Case(_conv(3, 8, 3, stride=2, padding=1), (5, 3, 11, 13)),
    "conv, no bias": Case(_conv(3, 8, 3, bias=False), (2, 3, 9, 9)),
    "conv, uneven stride and padding": Case(_conv(3, 4, (3, 5), stride=(2, 1), padding=(0, 3)), (2, 3, 9, 8)),
    "conv, dilation": Case(_conv(4, 6, 3, padding=2, dilation=2), (2, 4, 9, 7)),
    "conv, groups": Case(_conv(6, 9, 3, padding=1, groups=3), (2, 6, 7, 7)),
    "conv, depthwise": Case(_conv(7, 7, 3, padding=1, stride=2, groups=7), (3, 7, 12, 9)),
    "conv, depthwise with two filters": Case(_conv(5, 10, 3, padding=1, groups=5), (3, 5, 7, 7)),
    "conv, same": Case(_conv(3, 4, 3, padding="same"), (2, 3, 8, 7)),
    "conv, uneven same": Case(_conv(3, 4, (2, 4), padding="same", dilation=(1, 3)), (2, 3, 12, 13)),
    "conv, valid": Case(_conv(3, 4, 3, padding="valid"), (2, 3, 8, 7)),
    "conv, reflect": Case(_conv(3, 4, 3, padding=2, padding_mode="reflect"), (2, 3, 8, 7)),
    "conv, replicate": Case(_conv(3, 4, 3, padding=(1, 2), padding_mode="replicate", stride=2), (2, 3, 8, 7)),
    "conv, circular": Case(_conv(3, 4, 3, padding=1, padding_mode="circular", groups=1), (2, 3, 8, 7)),
    "conv, uneven same and circular": Case(_conv(3, 4, 4, padding="same", padding_mode="circular"), (2, 3, 8, 7)),
    "conv of one image": Case(_conv(3, 4, 3, padding=1), (3, 8, 7)),
    "conv of an empty batch": Case(_conv(3, 4, 3), (0, 3, 8, 7)),
    "conv as timm pads": Case(_conv_same(3, 4, 3, stride=2), (2, 3, 9, 8)),
}

AXES: dict[str, Sequence] = {
    "dtype": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "values": ("float32", "float16", "bfloat16", "int8", "int4"),
    "fill": ("zero", "mean", "known"),
    "rectified": (False, True),
    "sparsity": (0.0, 0.5, 0.9, 0.97),
    "index": ("auto", "bitmap", "tile"),
    "layout": ("contiguous", "channels_last", "sliced", "transposed"),
    "trained": ("all", "weight", "input", "bias", "nothing"),
}


def pairwise(axes: dict[str, Sequence], seed: int = 0) -> list[dict[str, object]]:
    """Settings in which every pair of values of any two axes occurs: greedily, the best of random candidates."""
    draw = random.Random(seed)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(axes, 2)
        for x in range(len(axes[a]))
        for y in range(len(axes[b]))
    }
    rows = []
    while missing:
        (a, x), (b, y) = min(missing)
        candidates = [
            {name: draw.randrange(len(values)) for name, values in axes.items()} | {a: x, b: y} for _ in range(40)
        ]
        best = max(candidates, key=lambda row: len(missing & _pairs(row)))
        missing -= _pairs(best)
        rows.append({name: axes[name][choice] for name, choice in best.items()})
    return rows


def _pairs(row: dict[str, int]) -> set[tuple[tuple[str, int], tuple[str, int]]]:
    return set(itertools.combinations(row.items(), 2))
