"""Any tree with one folder a class.

Two layouts: ``root/train/<class>/`` with ``root/test/<class>/`` and, if there is one, ``root/val/<class>/``; or
``root/<class>/`` alone, which is split here. Files that are no images by their extension, and names with a leading dot,
are passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transfer.data.images import EXTENSIONS, ImageFiles, check_files
from transfer.data.spec import LabelledImages, Splits
from transfer.data.splits import stratified_holdout
from transfer.errors import UserError

LAYOUT = "a folder for each class with images in it, or train/, test/ (and val/) that hold such folders"


def load(data: Mapping[str, Any], paths: Mapping[str, Any]) -> Splits:
    """Return the splits of the tree at ``data.root``.

    Where the tree has train/ and test/ but no val/, validation is drawn from train/. Where it has train/ and val/ but
    no test/, val/ is the test split, since nothing may be selected on it.
    """
    root = Path(data["root"] if data["root"] is not None else Path(paths["data"]) / data["name"]).expanduser()
    if not root.is_dir():
        raise UserError(f"data.root={root} is not a folder: it takes {LAYOUT}")
    parts = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    return _from_parts(root, parts, data) if "train" in parts else _from_one_tree(root, data)


def _from_parts(root: Path, parts: Mapping[str, Path], data: Mapping[str, Any]) -> Splits:
    if len(parts) == 1:
        raise UserError(
            f"data.root={root} has train/ but no test/: add test/, or move the class folders of train/ "
            "up into data.root to have them split"
        )
    names = _class_names(parts["train"])
    test_name = "test" if "test" in parts else "val"
    test = _labelled(parts[test_name], names)
    train = _labelled(parts["train"], names)
    if "val" in parts and test_name == "test":
        val = _labelled(parts["val"], names)
        return Splits(train, val, test, names, "train/, val/ and test/ as found", given=("val", "test"))
    kept, val = stratified_holdout(train.labels, data["val_fraction"], data["split_seed"], "data.val_fraction", names)
    note = f"test is {test_name}/; validation drawn from train/ with data.split_seed={data['split_seed']}"
    return Splits(train.select(kept), train.select(val), test, names, note, given=("test",))


def _from_one_tree(root: Path, data: Mapping[str, Any]) -> Splits:
    names = _class_names(root)
    everything = _labelled(root, names)
    seed = data["split_seed"]
    rest, test = stratified_holdout(everything.labels, data["test_fraction"], seed, "data.test_fraction", names)
    pool = everything.select(rest)
    share = data["val_fraction"] / (1 - data["test_fraction"])
    train, val = stratified_holdout(pool.labels, share, seed, "data.val_fraction", names, data["val_fraction"])
    note = f"stratified, drawn with data.split_seed={seed}"
    return Splits(pool.select(train), pool.select(val), everything.select(test), names, note)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if len(names) < 2:
        raise UserError(f"data.root: {folder} has {len(names)} class folders, at least 2 are needed: it takes {LAYOUT}")
    return names


def _labelled(folder: Path, names: tuple[str, ...]) -> LabelledImages:
    found = {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    unknown = sorted(found - set(names))
    if unknown:
        raise UserError(
            f"data.root: class {unknown[0]!r} is in {folder} but not in train/: a class needs training "
            "images; add them or remove the folder"
        )
    files, labels = [], []
    for label, name in enumerate(names):
        inside = _images(folder / name) if name in found else []
        if not inside and (folder.name == "train" or len(found) == len(names)):
            kinds = " ".join(sorted(EXTENSIONS))
            raise UserError(f"data.root: {folder / name} has no images: each class needs files that end in {kinds}")
        files += inside
        labels += [label] * len(inside)
    if not files:
        raise UserError(f"data.root: {folder} has no images: it takes {LAYOUT}")
    check_files(files)
    return LabelledImages(ImageFiles(tuple(files)), tuple(labels))


def _images(folder: Path) -> list[Path]:
    """Image files below ``folder``, sorted by their path relative to it, so that every machine sees one order."""
    inside = (path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    return sorted(
        (path for path in inside if not path.name.startswith(".")), key=lambda path: path.relative_to(folder).as_posix()
    )
