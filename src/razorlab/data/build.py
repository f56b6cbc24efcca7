"""From the ``data`` section of a configuration to three data sets of uint8 tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset

from razorlab.data.images import CHECKED
from razorlab.data.masks import MaskedImages
from razorlab.data.registry import DATASETS
from razorlab.data.spec import LabelledImages, Splits
from razorlab.data.splits import check_classes, lacking, stratified_holdout
from razorlab.data.texts import Encode, EncodedTexts
from razorlab.data.transforms import TwoPartTransform, eval_transform, train_transform
from razorlab.errors import UserError

if TYPE_CHECKING:
    from razorlab import schema


class TensorImages(Dataset):
    """Images as uint8 tensors (3, S, S) with their class.

    Args:
        source: the images.
        transform: to the network's size.
        cache: keep the fixed part's result of each image once it was asked for (3*S*S bytes per image).
    """

    def __init__(self, source: LabelledImages, transform: TwoPartTransform, cache: bool) -> None:
        self.source = source
        self.transform = transform
        self.cached: dict[int, Tensor] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.cached is not None and index in self.cached:
            image = self.cached[index]
        else:
            image = self.transform.fixed(self.source.images[index])
            if self.cached is not None:
                self.cached[index] = image
        return self.transform.random(image), self.source.labels[index]

    @property
    def labels(self) -> Tensor:
        """Class of each image, (N,) int64."""
        return torch.tensor(self.source.labels)


Items: TypeAlias = TensorImages | MaskedImages | EncodedTexts


@dataclass(frozen=True)
class DataBundle:
    """The three splits, ready to be batched, and the names of the classes."""

    train: Items
    val: Items
    test: Items
    class_names: tuple[str, ...]
    note: str


def build_data(
    data: schema.Data,
    paths: schema.Paths,
    check: bool = True,
    task: str = "classification",
    encode: Encode | None = None,
) -> DataBundle:
    """Load the data set that ``data.name`` names.

    Args:
        data, paths: those sections of the configuration.
        check: decode its files first; False where another process of the job has done that.
        task: ``classification``, ``segmentation`` for the class of each pixel, or ``text`` for that of each text.
        encode: makes token numbers of texts, for that task.

    Raises:
        UserError: the data set is unknown, missing or damaged, has no labels for the task, or a class has no images in
            a split.
    """
    name = data["name"]
    if name not in DATASETS:
        raise UserError.value("data.name", name, "|".join(sorted(DATASETS)))
    token = CHECKED.set(not check)
    try:
        splits = DATASETS[name].load(data, paths)
    finally:
        CHECKED.reset(token)
    names = _class_names(splits, name, task)
    if data["protocol"] == "official":
        splits = official(splits, data.get("official_test", "test"))
    if (share := data["train_fraction"]) < 1:
        _, used = stratified_holdout(
            splits.train.labels, share, data["split_seed"], "data.train_fraction", splits.class_names
        )
        splits = replace(splits, train=splits.train.select(used))
    if task == "segmentation":
        final, cache = eval_transform(data, masks=True), data["cache"]
        train = MaskedImages(splits.train, train_transform(data), cache)
        val, test = (MaskedImages(part, final, cache) for part in (splits.val, splits.test))
        return DataBundle(train, val, test, names, splits.note)
    check_classes(splits, data)
    if task == "text":
        assert encode is not None
        parts = [EncodedTexts(part, encode) for part in (splits.train, splits.val, splits.test)]
        return DataBundle(parts[0], parts[1], parts[2], names, splits.note + lacking(splits))
    if (kind := data["train_transform"]) == "scale_crop":
        raise UserError.value("data.train_transform", kind, "plain|random_crop|resize_crop, for task=classification")
    final = eval_transform(data)
    return DataBundle(
        train=TensorImages(splits.train, train_transform(data), data["cache"]),
        val=TensorImages(splits.val, final, data["cache"]),
        test=TensorImages(splits.test, final, data["cache"]),
        class_names=names,
        note=splits.note + lacking(splits),
    )


def official(splits: Splits, reported_on: str) -> Splits:
    """Return the splits as the released code uses them: nothing is selected, so validation is the part reported on.

    Args:
        reported_on: ``test``, and every other image trains; or ``val``, and the training images but for those train.
    """
    note = f"{splits.note}; official protocol: nothing is selected, the last weights are reported on"
    if reported_on == "val":
        given: tuple[str, ...] = ("val", "test") if "val" in splits.given else ()
        return replace(splits, test=splits.val, given=given, note=f"{note} the validation images, test is not used")
    given = ("val", "test") if "test" in splits.given else ("val",)
    joined = splits.train + splits.val
    return replace(splits, train=joined, val=splits.test, given=given, note=f"{note} test, every other image trains")


def _class_names(splits: Splits, name: str, task: str) -> tuple[str, ...]:
    has = {
        "segmentation": splits.mask_names,
        "text": splits.class_names if splits.texts else (),
        "classification": () if splits.texts else splits.class_names,
    }
    if not has[task]:
        what = {"segmentation": "class per pixel", "text": "texts", "classification": "class per image"}[task]
        other = "|".join(offered for offered, names in has.items() if names)
        raise UserError(f"data={name} task={task}: it has no {what}; set task={other}, or choose another data set")
    return has[task]
