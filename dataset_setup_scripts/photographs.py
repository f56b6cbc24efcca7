"""Cut ten photographs into pieces: which one is a piece from?

    python dataset_setup_scripts/photographs.py [--root data]
    python train.py data=folder data.root=data/photographs

Eight colour photographs come in the package of scikit-image, two in that of scikit-learn. Each photograph is a class.
Its pieces, 48 x 48 pixels that do not overlap, are drawn at random with a fixed seed: 15 for training, 5 for
validation, 25 for test, 450 in all. A point of test accuracy is 2.5 pieces.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 48
FLAT = 2.0  # standard deviation, of 255, up to which a piece is of one colour
SPLITS = {"train": 15, "val": 5, "test": 25}
# file in skimage/data: class (sources and licences: https://github.com/scikit-image/scikit-image/tree/main/LICENSES)
SKIMAGE = {
    "astronaut.png": "portrait",
    "chelsea.png": "cat",
    "coffee.png": "cup",
    "hubble_deep_field.jpg": "galaxies",
    "ihc.png": "tissue",
    "motorcycle_left.png": "motorcycle",
    "retina.jpg": "retina",
    "rocket.jpg": "rocket",
}
# the same of sklearn/datasets/images (https://scikit-learn.org/stable/datasets/loading_other_datasets.html)
SKLEARN = {"china.jpg": "temple", "flower.jpg": "flower"}


def photographs() -> Iterator[tuple[str, Image.Image]]:
    """(class, picture), by class.

    Raises:
        ImportError: scikit-image is not installed.
        FileNotFoundError: the installed version has no such picture.
    """
    import skimage
    import sklearn.datasets

    folders = {
        Path(skimage.__file__).parent / "data": SKIMAGE,
        Path(sklearn.datasets.__file__).parent / "images": SKLEARN,
    }
    found = {name: folder / file for folder, names in folders.items() for file, name in names.items()}
    for name, path in sorted(found.items()):
        with Image.open(path) as picture:
            yield name, picture.convert("RGB")


def pieces(picture: Image.Image, seed: int) -> Iterator[Image.Image]:
    """Pieces that do not overlap, in random order; those of one colour, as outside of an eye, are left out."""
    columns, rows = picture.width // SIDE, picture.height // SIDE
    for i in map(int, np.random.default_rng(seed).permutation(rows * columns)):
        left, top = i % columns * SIDE, i // columns * SIDE
        piece = picture.crop((left, top, left + SIDE, top + SIDE))
        if np.asarray(piece).std((0, 1)).max() > FLAT:
            yield piece


def write(folder: Path) -> int:
    """Write every piece to folder/split/class/number.png; returns how many."""
    written = 0
    for seed, (name, picture) in enumerate(photographs()):
        rest = pieces(picture, seed)
        for split, count in SPLITS.items():
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                next(rest).save(place / f"{number:02d}.png")
                written += 1
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of all data sets")
    folder = parser.parse_args(arguments).root / "photographs"
    try:
        print(f"{write(folder)} pieces of ten photographs in {folder}")
    except ImportError:
        print("the photographs come in scikit-image's package: pip install scikit-image==0.26.0", file=sys.stderr)
        return 2
    except OSError as problem:
        print(f"{problem}: use scikit-image 0.26.0, and a folder with room for 5 MB", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
