"""Scenes composed of scikit-learn's handwritten digits, each pixel labelled: the embedded set of dense prediction.

A scene is 96 x 96 pixels: two to four digits, each enlarged to 32 to 48 pixels and put at a random place, in a random
grey on a darker ground with noise. A later digit covers an earlier one. A pixel's class is 0 for the ground, else its
digit plus one. Strokes are labelled where they are brighter than half of the brightest; a rim of one pixel of the
source around them, where digit and ground mix, is left unlabelled.

The digits of training, validation and test scenes are disjoint, and so stratified as those of ``data=digits``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from razorlab.data import digits
from razorlab.data.spec import LabelledImages, Splits
from razorlab.data.transforms import UNLABELLED

if TYPE_CHECKING:
    from razorlab import schema

SIDE = 96
SCENES = {"train": 240, "val": 60, "test": 120}
DIGITS = 2, 4  # in a scene
SIDES = 32, 48  # of a digit, pixels
INK = 128  # of 255: brighter is the digit, darker down to ``RIM`` neither
RIM = 48


@dataclass(frozen=True)
class _Scenes:
    pixels: np.ndarray  # (N, 96, 96) uint8

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index]).convert("RGB")


def load(data: schema.Data, paths: schema.Paths) -> Splits:
    """Return the scenes; ``data.split_seed`` draws the digits of each split and composes them."""
    source = digits.load(data, paths)
    parts = {
        name: _compose(getattr(source, name), count, np.random.default_rng([data["split_seed"], number]))
        for number, (name, count) in enumerate(SCENES.items())
    }
    note = f"composed of disjoint digits, drawn with data.split_seed={data['split_seed']}"
    return Splits(parts["train"], parts["val"], parts["test"], (), note, mask_names=("ground", *source.class_names))


def _compose(source: LabelledImages, count: int, random: np.random.Generator) -> LabelledImages:
    scenes = [_scene(source, random) for _ in range(count)]
    pixels, masks = (np.stack(parts) for parts in zip(*scenes, strict=True))
    return LabelledImages(_Scenes(pixels), (0,) * count, masks)


def _scene(source: LabelledImages, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A scene (96, 96) and its mask, uint8 both."""
    ground = random.integers(20, 60)
    scene = (ground + random.normal(0, 8, (SIDE, SIDE))).clip(0, 255)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for index in random.integers(len(source), size=random.integers(DIGITS[0], DIGITS[1] + 1)):
        side = int(random.integers(SIDES[0], SIDES[1] + 1))
        top, left = (int(at) for at in random.integers(SIDE - side + 1, size=2))
        digit = source.images[int(index)].convert("L").resize((side, side), Image.Resampling.BILINEAR)
        ink = np.asarray(digit, np.float64)
        place = slice(top, top + side), slice(left, left + side)
        share = ink / 255
        scene[place] = scene[place] * (1 - share) + random.integers(140, 256) * share
        mask[place] = np.where(ink > INK, source.labels[int(index)] + 1, np.where(ink > RIM, UNLABELLED, mask[place]))
    return scene.round().astype(np.uint8), mask
