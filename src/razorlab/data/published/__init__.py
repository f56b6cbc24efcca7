"""The published data sets of the paper's tables.

``load`` is what the registry of data sets needs, ``build`` gives one split as a plain torch data set. Neither
downloads anything: dataset_setup_scripts/ does. To add a data set: a ``PublishedSpec`` in a module here, a row in
``PUBLISHED``, a set-up script, and a maker in tests/datasets/tiny_archives.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch.utils.data import Dataset

from razorlab.data.published.cars import CARS
from razorlab.data.published.cifar import CIFAR10, CIFAR100
from razorlab.data.published.cub import CUB200
from razorlab.data.published.food import FOOD101
from razorlab.data.published.listing import file_paths, read_listing
from razorlab.data.published.oxford import AIRCRAFT, FLOWERS, PETS
from razorlab.data.published.spec import Archive, Listing, PublishedSpec
from razorlab.data.published.vader import VADER
from razorlab.data.published.voc import VOC
from razorlab.data.spec import LabelledImages, Splits
from razorlab.data.splits import named_holdout, stratified_holdout
from razorlab.errors import UserError

if TYPE_CHECKING:
    from razorlab import schema

__all__ = ["PUBLISHED", "Archive", "Listing", "PublishedImages", "PublishedSpec", "build", "load", "make_splits"]

PUBLISHED: dict[str, PublishedSpec] = {
    spec.name: spec for spec in (CIFAR10, CIFAR100, FLOWERS, PETS, CARS, AIRCRAFT, CUB200, FOOD101, VOC, VADER)
}

# The committed split: with these two, scikit-learn's stratified draw gives every machine the same validation images.
VAL_FRACTION = 0.1  # of the published training images
SPLIT_SEED = 0


def make_splits(
    spec: PublishedSpec, root: Path, val_fraction: float, split_seed: int, val_file: str | None = None
) -> Splits:
    """Return the published test split, and the published training images (a published validation part among them)
    divided into train and validation: those that ``val_file`` names, or a draw that is stratified by class.

    Raises:
        UserError: files are missing or damaged, ``val_fraction`` leaves a class without validation images, or
            ``val_file`` names other images than training images.
    """
    listing = read_listing(spec, root)
    names = listing.class_names
    if val_file is None:
        kept, val = stratified_holdout(listing.train.labels, val_fraction, split_seed, "data.val_fraction", names)
        how = f"drawn from the training images with data.split_seed={split_seed}"
    else:
        kept, val = named_holdout(file_paths(listing.train), val_file)
        how = f"the training images that {val_file} names"
    note = f"{spec.split}; validation {how}"
    return Splits(
        train=listing.train.select(kept),
        val=listing.train.select(val),
        test=listing.test,
        class_names=names,
        note=note,
        given=("test",),
        mask_names=listing.mask_names,
        texts=listing.texts,
    )


def load(data: schema.Data, paths: schema.Paths) -> Splits:
    """Return the splits of the data set ``data["name"]`` from ``data["root"]``, or ``paths["data"]/<name>`` if null.

    Raises:
        UserError: as ``make_splits``.
    """
    root = Path(data["root"] if data["root"] is not None else Path(paths["data"]) / data["name"]).expanduser()
    spec, val_file = PUBLISHED[data["name"]], data.get("val_file")  # a record may be older than the key
    return make_splits(spec, root, data["val_fraction"], data["split_seed"], val_file)


class PublishedImages(Dataset):
    """Images with their class.

    Args:
        source: the images.
        classes: names of the classes; a label is an index into them.
        transform: applied to each PIL image; None leaves it.
    """

    def __init__(
        self, source: LabelledImages, classes: tuple[str, ...], transform: Callable[[Image.Image], Any] | None = None
    ) -> None:
        self.source = source
        self.classes = classes
        self.transform = transform

    @property
    def targets(self) -> tuple[int, ...]:
        """Class of each image."""
        return self.source.labels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.source.images[index]
        return (image if self.transform is None else self.transform(image)), self.source.labels[index]


def build(
    name: str | PublishedSpec,
    root: str | Path,
    split: str,
    protocol: str = "validation",
    transform: Callable[[Image.Image], Any] | None = None,
    val_fraction: float = VAL_FRACTION,
    split_seed: int = SPLIT_SEED,
) -> PublishedImages:
    """Return one split of a published data set as RGB PIL images with labels.

    Args:
        root: the data set's own folder, as its set-up script leaves it.
        split: ``train``, ``val`` or ``test``.
        protocol: ``validation`` selects on images held out of training; ``official`` trains on all of them and
            selects nothing, as published results of this method do: ``val`` is then the test split.

    Raises:
        UserError: an unknown name, split or protocol; files that are missing or damaged.
    """
    if split not in ("train", "val", "test"):
        raise UserError.value("split", split, "train|val|test")
    if protocol not in ("validation", "official"):
        raise UserError.value("data.protocol", protocol, "validation|official")
    if isinstance(name, str) and name not in PUBLISHED:
        raise UserError.value("data.name", name, "|".join(sorted(PUBLISHED)))
    spec = PUBLISHED[name] if isinstance(name, str) else name
    root = Path(root).expanduser()
    if protocol == "official" or split == "test":  # nothing has to be drawn
        listing = read_listing(spec, root)
        return PublishedImages(listing.train if split == "train" else listing.test, listing.class_names, transform)
    splits = make_splits(spec, root, val_fraction, split_seed)
    return PublishedImages(getattr(splits, split), splits.class_names, transform)
