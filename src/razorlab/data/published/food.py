"""Food-101, its labels parsed by torchvision's class."""

from __future__ import annotations

from pathlib import Path

from torchvision.datasets import Food101

from razorlab.data.images import ImageFiles
from razorlab.data.published.spec import GB, Archive, Listing, PublishedSpec
from razorlab.data.spec import LabelledImages


def _read(root: Path) -> Listing:
    train, test = (Food101(root, split=split) for split in ("train", "test"))
    if train.classes != test.classes:
        raise ValueError("train.json and test.json name different classes")
    return Listing(
        *(LabelledImages(ImageFiles(tuple(part._image_files)), tuple(part._labels)) for part in (train, test)),
        class_names=tuple(train.classes),
    )


FOOD101 = PublishedSpec(
    name="food101",
    classes=101,
    train=75_750,
    test=25_250,
    archives=(
        Archive(
            name="food-101.tar.gz",
            md5="85eeb15f3717b99a5da872d97d918f87",
            url="http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
            into="",
            makes="food-101",
            max_bytes=10 * GB,
            labels=("food-101/meta/train.json", "food-101/meta/test.json"),
        ),
    ),
    read=_read,
    source="Bossard, Guillaumin and Van Gool, ECCV 2014",
)
