"""Stanford Cars. Its owners no longer offer it, so its four files have to be placed by hand.

They were ``car_devkit.tgz``, ``cars_train.tgz``, ``cars_test.tgz`` and ``cars_test_annos_withlabels.mat`` on
ai.stanford.edu; the checksums are those that torchvision checked while it still downloaded them (pytorch/vision#7545).
"""

from __future__ import annotations

from pathlib import Path

from torchvision.datasets import StanfordCars

from razorlab.data.images import ImageFiles
from razorlab.data.published.spec import GB, Archive, Listing, PublishedSpec
from razorlab.data.spec import LabelledImages

_FOLDER = "stanford_cars"


def _read(root: Path) -> Listing:
    parts = {}
    for split in ("train", "test"):
        source = StanfordCars(root, split=split)
        files = tuple(Path(path) for path, _ in source._samples)
        parts[split] = LabelledImages(ImageFiles(files), tuple(int(label) for _, label in source._samples))
    return Listing(parts["train"], parts["test"], tuple(str(name) for name in source.classes))


CARS = PublishedSpec(
    name="cars",
    classes=196,
    train=8_144,
    test=8_041,
    archives=(
        Archive(
            name="car_devkit.tgz",
            md5="c3b158d763b6e2245038c8ad08e45376",
            url=None,
            into=_FOLDER,
            makes="devkit",
            labels=("devkit/cars_train_annos.mat", "devkit/cars_meta.mat"),
        ),
        Archive(
            name="cars_train.tgz",
            md5="065e5b463ae28d29e77c1b4b166cfe61",
            url=None,
            into=_FOLDER,
            makes="cars_train",
            max_bytes=2 * GB,
        ),
        Archive(
            name="cars_test.tgz",
            md5="4ce7ebf6a94d07f1952d94dd34c4d501",
            url=None,
            into=_FOLDER,
            makes="cars_test",
            max_bytes=2 * GB,
        ),
        Archive(
            name="cars_test_annos_withlabels.mat",
            md5="b0a2b23655a3edd16d84508592a98d10",
            url=None,
            into=_FOLDER,
            makes="cars_test_annos_withlabels.mat",
        ),
    ),
    read=_read,
    source="Krause, Stark, Deng and Fei-Fei, 3dRR 2013",
)
