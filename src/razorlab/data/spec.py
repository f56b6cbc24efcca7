"""What a data set is to the laboratory.

To add one: write a loader ``load(settings) -> Splits`` and give it a row in ``razorlab.data.registry.DATASETS`` and a
file in ``configs/data/``. Everything else (transforms, caching, protocol, fractions, errors) is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

if TYPE_CHECKING:
    from razorlab import schema


class ImageSource(Protocol):
    """A sequence of RGB images. Reading one may raise ``UserError`` that names the file."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Image.Image: ...


@dataclass(frozen=True)
class LabelledImages:
    """Images and their classes.

    Args:
        images: the images, decoded when asked for.
        labels: class of each, an index into ``Splits.class_names``; where there are none, what splits are stratified
            by.
        masks: of each the class of every pixel, (H, W) uint8, an index into ``Splits.mask_names`` or 255 for none;
            None where the data set has no masks.
    """

    images: ImageSource
    labels: tuple[int, ...]
    masks: Any = None

    def __post_init__(self) -> None:
        assert len(self.images) == len(self.labels), (len(self.images), len(self.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Sequence[int]) -> LabelledImages:
        """Return the images at ``indices``, in that order."""
        labels = tuple(self.labels[i] for i in indices)
        masks = None if self.masks is None else _selected(self.masks, indices)
        return LabelledImages(_selected(self.images, indices), labels, masks)

    def __add__(self, other: LabelledImages) -> LabelledImages:
        both = self.masks is not None and other.masks is not None
        masks = _Joined(self.masks, other.masks) if both else None
        return LabelledImages(_Joined(self.images, other.images), self.labels + other.labels, masks)


def _selected(source: Any, indices: Sequence[int]) -> _Selected:
    if isinstance(source, _Selected):
        return _Selected(source.source, tuple(source.indices[i] for i in indices))
    return _Selected(source, tuple(indices))


@dataclass(frozen=True)
class _Selected:
    """Some of the images or masks of ``source``."""

    source: Any
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.source[self.indices[index]]


@dataclass(frozen=True)
class _Joined:
    first: Any
    second: Any

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, index: int) -> Any:
        return self.first[index] if index < len(self.first) else self.second[index - len(self.first)]


@dataclass(frozen=True)
class Splits:
    """A data set in three disjoint parts.

    Args:
        class_names: the classes; a label is an index into them. Empty where images have no class.
        note: how the splits came about, for the log.
        given: which of ``val`` and ``test`` the data set brings, rather than have them drawn here.
        mask_names: the classes of pixels; empty where there are no masks.
        texts: whether what is labelled are texts, not images.
    """

    train: LabelledImages
    val: LabelledImages
    test: LabelledImages
    class_names: tuple[str, ...]
    note: str = ""
    given: tuple[str, ...] = ()
    mask_names: tuple[str, ...] = ()
    texts: bool = False


@dataclass(frozen=True)
class DatasetSpec:
    """One data set.

    Args:
        load: makes the splits from the ``data`` and ``paths`` sections of the configuration. It downloads nothing;
            where files are missing it raises ``UserError`` with the command that brings them.
    """

    load: Callable[[schema.Data, schema.Paths], Splits]
