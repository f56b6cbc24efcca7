"""PASCAL VOC 2012's segmentation set with the further masks of SBD, "augmented" as segmentation networks are trained.

Training: VOC's 1,464 training images with VOC's masks, and every image of SBD that VOC has neither in training nor in
validation, with SBD's masks: 10,582 in all. Test: VOC's 1,449 validation images, since those of its test have no
published masks.
"""

from __future__ import annotations

from pathlib import Path

from razorlab.data.images import ImageFiles
from razorlab.data.masks import MaskFiles
from razorlab.data.published.spec import GB, Archive, Listing, PublishedSpec
from razorlab.data.spec import LabelledImages

CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_VOC, _SBD = "VOCdevkit/VOC2012", "benchmark_RELEASE/dataset"


def _names(file: Path) -> list[str]:
    names = file.read_text(encoding="ascii").split()
    if not names:
        raise ValueError(f"{file.name} names no image")
    return names


def _read(root: Path) -> Listing:
    voc, sbd = root / _VOC, root / _SBD
    train, test = (_names(voc / "ImageSets" / "Segmentation" / f"{part}.txt") for part in ("train", "val"))
    taken = {*train, *test}
    further = sorted({name for part in ("train", "val") for name in _names(sbd / f"{part}.txt")} - taken)
    images = [voc / "JPEGImages" / f"{name}.jpg" for name in (*train, *further)]
    masks = [voc / "SegmentationClass" / f"{name}.png" for name in train]
    masks += [sbd / "cls" / f"{name}.mat" for name in further]
    return Listing(
        train=_part(images, masks),
        test=_part(
            [voc / "JPEGImages" / f"{name}.jpg" for name in test],
            [voc / "SegmentationClass" / f"{name}.png" for name in test],
        ),
        class_names=(),
        mask_names=CLASSES,
    )


def _part(images: list[Path], masks: list[Path]) -> LabelledImages:
    return LabelledImages(ImageFiles(tuple(images)), (0,) * len(images), MaskFiles(tuple(masks)))


VOC = PublishedSpec(
    name="voc",
    classes=len(CLASSES),
    train=10_582,
    test=1_449,
    archives=(
        Archive(
            name="VOCtrainval_11-May-2012.tar",
            md5="6cd6e144f989b92b3379bac3b3de84fd",
            url="https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            into="",
            makes="VOCdevkit",
            max_bytes=4 * GB,
            labels=tuple(f"{_VOC}/ImageSets/Segmentation/{part}.txt" for part in ("train", "val")),
        ),
        Archive(
            name="benchmark.tgz",
            md5="82b4d87ceb2ed10f6038a1cba92111cb",
            url="https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
            into="",
            makes="benchmark_RELEASE",
            max_bytes=4 * GB,
            labels=tuple(f"{_SBD}/{part}.txt" for part in ("train", "val")),
        ),
    ),
    read=_read,
    source="Everingham et al., IJCV 2015; further masks: Hariharan et al., ICCV 2011",
)
