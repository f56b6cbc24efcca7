"""The data sets of Oxford's Visual Geometry Group: 102 Flowers, Pets, FGVC-Aircraft.

torchvision's classes parse the labels; images are opened by this project's reader, which names a file that it cannot
read. torchvision keeps paths and labels in attributes with a leading underscore; its version is pinned and the tests
read every data set through them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from torchvision.datasets import FGVCAircraft, Flowers102, OxfordIIITPet

from razorlab.data.images import ImageFiles
from razorlab.data.masks import MaskFiles
from razorlab.data.published.spec import GB, Archive, Listing, PublishedSpec
from razorlab.data.spec import LabelledImages
from razorlab.data.transforms import UNLABELLED

# What a trimap's 1, 2 and 3 mean: the pet, the background, and a rim that its owners call "not classified".
TRIMAP = UNLABELLED, 1, 0, UNLABELLED
_HOST = "https://www.robots.ox.ac.uk/~vgg/data"


def labelled(files: list[str] | list[Path], labels: list[int]) -> LabelledImages:
    """Return the images at ``files`` with their labels."""
    return LabelledImages(ImageFiles(tuple(Path(file) for file in files)), tuple(int(label) for label in labels))


class _Flowers(Flowers102):
    # Set-up and every reading verify the label files against the checksums below; torchvision need not do it again.
    _file_dict: ClassVar = {key: (name, None) for key, (name, _) in Flowers102._file_dict.items()}


def _read_flowers(root: Path) -> Listing:
    train, val, test = (_Flowers(root, split=split) for split in ("train", "val", "test"))
    return Listing(
        train=labelled(train._image_files + val._image_files, train._labels + val._labels),
        test=labelled(test._image_files, test._labels),
        class_names=tuple(Flowers102.classes),
    )


def _read_pets(root: Path) -> Listing:
    splits = [OxfordIIITPet(root, split=split) for split in ("trainval", "test")]
    parts = [replace(labelled(it._images, it._labels), masks=MaskFiles(tuple(it._segs), TRIMAP)) for it in splits]
    return Listing(*parts, class_names=tuple(splits[0].classes), mask_names=("background", "pet"))


def _read_aircraft(root: Path) -> Listing:
    train, test = (FGVCAircraft(root, split=split) for split in ("trainval", "test"))
    return Listing(
        train=labelled(train._image_files, train._labels),
        test=labelled(test._image_files, test._labels),
        class_names=tuple(train.classes),
    )


FLOWERS = PublishedSpec(
    name="flowers",
    classes=102,
    train=2_040,
    test=6_149,
    archives=(
        Archive(
            name="102flowers.tgz",
            md5="52808999861908f626f3c1f4e79d11fa",
            url=f"{_HOST}/flowers/102/102flowers.tgz",
            into="flowers-102",
            makes="jpg",
        ),
        *(
            Archive(name=name, md5=md5, url=f"{_HOST}/flowers/102/{name}", into="flowers-102", makes=name)
            for name, md5 in (
                ("imagelabels.mat", "e0620be6f572b9609742df49c70aed4d"),
                ("setid.mat", "a5357ecc9cb78c4bef273ce3793fc85c"),
            )
        ),
    ),
    read=_read_flowers,
    source="Nilsback and Zisserman, ICVGIP 2008",
)

PETS = PublishedSpec(
    name="pets",
    classes=37,
    train=3_680,
    test=3_669,
    archives=(
        Archive(
            name="images.tar.gz",
            md5="5c4f3ee8e5d25df40f4fd59a7f44e54c",
            url=f"{_HOST}/pets/data/images.tar.gz",
            into="oxford-iiit-pet",
            makes="images",
            max_bytes=2 * GB,
        ),
        Archive(
            name="annotations.tar.gz",
            md5="95a8c909bbe2e81eed6a22bccdf3f68f",
            url=f"{_HOST}/pets/data/annotations.tar.gz",
            into="oxford-iiit-pet",
            makes="annotations",
            labels=("annotations/trainval.txt", "annotations/test.txt"),
        ),
    ),
    read=_read_pets,
    source="Parkhi, Vedaldi, Zisserman and Jawahar, CVPR 2012",
)

AIRCRAFT = PublishedSpec(
    name="aircraft",
    classes=100,
    train=6_667,
    test=3_333,
    archives=(
        Archive(
            name="fgvc-aircraft-2013b.tar.gz",
            md5="d4acdd33327262359767eeaa97a4f732",
            url=f"{_HOST}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
            into="",
            makes="fgvc-aircraft-2013b",
            max_bytes=6 * GB,
            labels=tuple(
                f"fgvc-aircraft-2013b/data/{name}.txt"
                for name in ("variants", "images_variant_trainval", "images_variant_test")
            ),
        ),
    ),
    read=_read_aircraft,
    source="Maji, Kannala, Rahtu, Blaschko and Vedaldi, arXiv 1306.5151",
)
