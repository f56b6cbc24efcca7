"""Reproducible stratified splits, and the check that every class has images in each of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from sklearn.model_selection import train_test_split

from razorlab.data.spec import Splits
from razorlab.errors import UserError

if TYPE_CHECKING:
    from razorlab import schema

SIDES = {"train": "training", "val": "validation", "test": "test"}


def stratified_holdout(
    labels: Sequence[int],
    fraction: float,
    seed: int,
    what: str,
    names: Sequence[str] = (),
    asked: float | None = None,
) -> tuple[list[int], list[int]]:
    """Split the indices of ``labels`` in two, with about the same share of every class.

    A small class may end up on one side alone: ``check_classes`` looks at the finished splits.

    Args:
        labels: class of each item.
        fraction: share that goes to the second part, in (0, 1).
        seed: the same labels, fraction and seed give the same split.
        what: the key that asks for the split, for the error.
        names: the classes' names, for the error.
        asked: the key's own value, for the error, where ``labels`` is what a first draw left.

    Returns:
        Sorted indices of the part that stays and of the part held out.

    Raises:
        UserError: a class has a single item, or there are fewer items to hold out than classes.
    """
    counts = Counter(labels)
    held_out = int(np.ceil(len(labels) * fraction))
    if min(counts.values()) < 2 or held_out < len(counts) or len(labels) - held_out < len(counts):
        smallest = min(counts, key=lambda label: (counts[label], label))
        name = repr(names[smallest]) if names else smallest
        value, of_what = (fraction, "images") if asked is None else (asked, "images that the test split leaves,")
        raise UserError(
            f"{what}={value:g} cannot be drawn from the {len(labels)} {of_what} of {len(counts)} classes (smallest "
            f"class: {name} with {counts[smallest]}): every class needs one on both sides; add images, remove the "
            f"class or change {what}"
        )
    kept, out = train_test_split(np.arange(len(labels)), test_size=held_out, random_state=seed, stratify=list(labels))
    return sorted(kept.tolist()), sorted(out.tolist())


def named_holdout(paths: Sequence[Path], file: str) -> tuple[list[int], list[int]]:
    """Split the indices of ``paths`` in two: the second part are the images that a text file names.

    Args:
        paths: image files, empty for images that lie in no files of their own.
        file: one image per line by its file name; folders before it, and words behind it, such as a class, are not
            looked at.

    Raises:
        UserError: the file cannot be read, or a line names none of the images or one that is not the only one so named.
    """
    try:
        lines = Path(file).read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"data.val_file={file} cannot be read ({error}): give a text file of image names") from error
    wanted = [line.split()[0].rpartition("/")[2] for line in lines if line.strip()]
    places = Counter(path.name for path in paths)
    wrong = next((name for name in wanted if places[name] != 1), None)
    if wrong is not None or len(set(wanted)) != len(wanted) or not 0 < len(wanted) < len(paths):
        found = f"{places[wrong]} training images are called {wrong!r}" if wrong else f"it names {len(wanted)} images"
        raise UserError(
            f"data.val_file={file} does not fit: {found}; it takes some of the {len(paths)} training images that are "
            "files, each once by its file name"
        )
    names = set(wanted)
    out = {index for index, path in enumerate(paths) if path.name in names}
    return [index for index in range(len(paths)) if index not in out], sorted(out)


def check_classes(splits: Splits, data: schema.Data) -> None:
    """Refuse splits that leave a class without training images, or a drawn split without images of a class.

    A validation or test split that the data set brings (``splits.given``) may lack a class.

    Args:
        splits: as they are going to be used.
        data: that section of the configuration.

    Raises:
        UserError: names the first such class, its images in each split, and what to do.
    """
    counts = {side: Counter(getattr(splits, side).labels) for side in SIDES}
    looked_at = [side for side in SIDES if side == "train" or side not in splits.given]
    bad = [(label, side) for label in range(len(splits.class_names)) for side in looked_at if not counts[side][label]]
    if not bad:
        return
    label, side = bad[0]
    key, value = _asking(side, label, counts, data)
    drawn = ", ".join(f"{counts[name][label]} for {word}" for name, word in SIDES.items())
    others = len({label for label, _ in bad}) - 1
    also = f" (and {others} more {'class' if others == 1 else 'classes'})" if others else ""
    raise UserError(
        f"{key}={value:g} leaves class {splits.class_names[label]!r}{also} without "
        f"{SIDES[side]} images ({drawn}); about {_enough(splits, data)} images are enough: add some, remove the class "
        f"or change {key}{', or make train/, val/ and test/ yourself' if data['name'] == 'folder' else ''}"
    )


def lacking(splits: Splits) -> str:
    """Say which classes the validation or test split that the data set brings has no images of; empty for none."""
    texts = []
    for side in splits.given:
        absent = sorted(set(range(len(splits.class_names))) - set(getattr(splits, side).labels))
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            texts.append(f"; no {SIDES[side]} images of class {splits.class_names[absent[0]]!r}{more}")
    return "".join(texts)


def _asking(side: str, label: int, counts: Mapping[str, Counter[int]], data: schema.Data) -> tuple[str, float]:
    """Return name and value of the key that took the images of class ``label`` away from ``side``."""
    if side == "train" and data["train_fraction"] < 1:
        return "data.train_fraction", data["train_fraction"]
    if side == "test" or (side == "train" and counts["test"][label] >= counts["val"][label]):
        return "data.test_fraction", data["test_fraction"]
    return "data.val_fraction", data["val_fraction"]


def _enough(splits: Splits, data: schema.Data) -> int:
    """Return how many images of a class give each drawn split at least one."""
    val = 0.0 if "val" in splits.given else data["val_fraction"]
    test = 0.0 if "test" in splits.given else data["test_fraction"]
    shares = (val, test, (1 - val - test) * data["train_fraction"])
    return math.ceil(1 / min(share for share in shares if share) - 1e-9)  # 1 - 0.1 - 0.8 is below 0.1
