"""Caltech-UCSD Birds-200-2011, for which torchvision has no class.

Four text files tie images, classes and the published split together by an image's number:
``images.txt`` (number, path under images/), ``image_class_labels.txt`` (number, class from 1),
``train_test_split.txt`` (number, 1 for train) and ``classes.txt`` (class, name).
"""

from __future__ import annotations

from pathlib import Path

from razorlab.data.images import ImageFiles
from razorlab.data.published.spec import GB, Archive, Listing, PublishedSpec
from razorlab.data.spec import LabelledImages

_FOLDER = "CUB_200_2011"
_TABLES = ("images", "image_class_labels", "train_test_split", "classes")


def _table(path: Path) -> dict[int, str]:
    """Read lines of a number and a value."""
    rows = (line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return {int(number): value.strip() for number, value in rows}


def _read(root: Path) -> Listing:
    folder = root / _FOLDER
    files, labels, is_train, names = (_table(folder / f"{name}.txt") for name in _TABLES)
    if not files.keys() == labels.keys() == is_train.keys():
        raise ValueError("images.txt, image_class_labels.txt and train_test_split.txt list different images")
    if sorted(names) != list(range(1, len(names) + 1)):
        raise ValueError("classes.txt does not number its classes from 1")

    def part(flag: str) -> LabelledImages:
        numbers = [number for number in sorted(files) if is_train[number] == flag]
        paths = tuple(folder / "images" / files[number] for number in numbers)
        return LabelledImages(ImageFiles(paths), tuple(int(labels[number]) - 1 for number in numbers))

    return Listing(part("1"), part("0"), tuple(names[number].partition(".")[2] for number in sorted(names)))


CUB200 = PublishedSpec(
    name="cub200",
    classes=200,
    train=5_994,
    test=5_794,
    archives=(
        Archive(
            name="CUB_200_2011.tgz",
            md5="97eceeb196236b17998738112f37df78",
            url="https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
            into="",
            makes=_FOLDER,
            max_bytes=3 * GB,
            labels=tuple(f"{_FOLDER}/{name}.txt" for name in _TABLES),
        ),
    ),
    read=_read,
    source="Wah, Branson, Welinder, Perona and Belongie, CNS-TR-2011-001",
)
