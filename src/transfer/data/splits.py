"""Reproducible stratified splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from sklearn.model_selection import train_test_split

from transfer.errors import UserError


def stratified_holdout(labels: Sequence[int], fraction: float, seed: int, what: str) -> tuple[list[int], list[int]]:
    """Split the indices of ``labels`` in two, with the same share of every class.

    Args:
        labels: class of each item.
        fraction: share that goes to the second part, in (0, 1).
        seed: the same labels, fraction and seed give the same split.
        what: the key that asks for the split, for the error.

    Returns:
        Sorted indices of the part that stays and of the part held out.

    Raises:
        UserError: a class has a single item, or there are fewer items to hold out than classes.
    """
    counts = Counter(labels)
    held_out = int(np.ceil(len(labels) * fraction))
    if min(counts.values()) < 2 or held_out < len(counts) or len(labels) - held_out < len(counts):
        smallest = min(counts.values())
        raise UserError(
            f"{what}={fraction} cannot be drawn from {len(labels)} images of {len(counts)} classes (smallest class: "
            f"{smallest}): every class needs one on both sides; add images or change {what}"
        )
    kept, out = train_test_split(np.arange(len(labels)), test_size=held_out, random_state=seed, stratify=list(labels))
    return sorted(kept.tolist()), sorted(out.tolist())
