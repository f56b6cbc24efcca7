"""scikit-learn's handwritten digits: 1,797 real grey images of 8x8 pixels in ten classes, shipped with the package.

The images are half of the test part of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin, Kaynak 1998).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from razorlab.data.spec import LabelledImages, Splits
from razorlab.data.splits import stratified_holdout

if TYPE_CHECKING:
    from razorlab import schema

WHITE = 16  # largest value in the source


@dataclass(frozen=True)
class _DigitImages:
    pixels: np.ndarray  # (N, 8, 8) uint8

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index]).convert("RGB")


def load(data: schema.Data, paths: schema.Paths) -> Splits:
    """Return the digits, stratified by class: ``test_fraction`` of all for test, ``val_fraction`` for validation."""
    source = load_digits()
    pixels = (source.images * (255 / WHITE)).round().astype(np.uint8)
    everything = LabelledImages(_DigitImages(pixels), tuple(int(label) for label in source.target))
    names, seed = tuple(str(name) for name in source.target_names), data["split_seed"]
    rest, test = stratified_holdout(everything.labels, data["test_fraction"], seed, "data.test_fraction", names)
    labels = [everything.labels[i] for i in rest]
    share = data["val_fraction"] / (1 - data["test_fraction"])
    train, val = stratified_holdout(labels, share, seed, "data.val_fraction", names, data["val_fraction"])
    return Splits(
        train=everything.select([rest[i] for i in train]),
        val=everything.select([rest[i] for i in val]),
        test=everything.select(test),
        class_names=names,
        note=f"stratified, drawn with data.split_seed={seed}",
    )
