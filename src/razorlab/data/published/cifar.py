"""CIFAR-10 and CIFAR-100 by torchvision's classes, which compare every file with its checksum before they unpickle it.

A pickle may have any function called, so the checksums, which torchvision publishes, are what is trusted here.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10 as Cifar10
from torchvision.datasets import CIFAR100 as Cifar100
from torchvision.datasets.utils import check_integrity

from razorlab.data.published.spec import Archive, Listing, PublishedSpec
from razorlab.data.spec import LabelledImages


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images held in memory, (N, 32, 32, 3) uint8."""

    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


def files(dataset: type[Cifar10]) -> dict[str, str]:
    """The MD5 of each file that is read, by its name in the folder that the archive makes."""
    return {**dict(dataset.train_list), **dict(dataset.test_list), dataset.meta["filename"]: dataset.meta["md5"]}


def _read(root: Path, dataset: type[Cifar10]) -> Listing:
    for name, md5 in files(dataset).items():
        path = root / dataset.base_folder / name
        if not check_integrity(path, md5):
            raise ValueError(f"{path} is damaged or another version: expected md5 {md5}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what NumPy says of a pickle that Python 2 has written
        parts = [dataset(root, train=train) for train in (True, False)]
    train, test = (LabelledImages(ArrayImages(part.data), tuple(part.targets)) for part in parts)
    return Listing(train, test, class_names=tuple(parts[0].classes))


def _spec(name: str, classes: int, dataset: type[Cifar10]) -> PublishedSpec:
    folder = dataset.base_folder
    labels = tuple(f"{folder}/{file}" for file in files(dataset))
    archive = Archive(dataset.filename, dataset.tgz_md5, dataset.url, into="", makes=folder, labels=labels)
    return PublishedSpec(
        name=name,
        classes=classes,
        train=50_000,
        test=10_000,
        archives=(archive,),
        read=partial(_read, dataset=dataset),
        source="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
    )


CIFAR10, CIFAR100 = _spec("cifar10", 10, Cifar10), _spec("cifar100", 100, Cifar100)
