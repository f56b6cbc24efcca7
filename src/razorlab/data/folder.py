"""Any tree with one folder per class.

Two layouts: ``root/train/<class>/`` with ``root/test/<class>/`` and, if there is one, ``root/val/<class>/``; or
``root/<class>/`` alone, which is split here. Images may lie in sub-folders of a class, links to folders are followed.
Files that are no images by their extension, and names with a leading dot, are passed over.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from razorlab.data.images import EXTENSIONS, ImageFiles, check_files
from razorlab.data.spec import LabelledImages, Splits
from razorlab.data.splits import stratified_holdout
from razorlab.errors import UserError, first_few

if TYPE_CHECKING:
    from razorlab import schema

LAYOUT = "a folder for each class with images in it, or train/, test/ (and val/) that hold such folders"


def load(data: schema.Data, paths: schema.Paths) -> Splits:
    """Return the splits of the tree at ``data.root``.

    Where the tree has train/ and test/ but no val/, validation is drawn from train/. Where it has train/ and val/ but
    no test/, val/ is the test split, since nothing may be selected on it.
    """
    root = Path(data["root"] if data["root"] is not None else Path(paths["data"]) / data["name"]).expanduser()
    if not root.is_dir():
        raise UserError(f"data.root={root} is not a folder: it takes {LAYOUT}")
    parts = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    return _from_parts(root, parts, data) if "train" in parts else _from_one_tree(root, data)


def _from_parts(root: Path, parts: Mapping[str, Path], data: schema.Data) -> Splits:
    if len(parts) == 1:
        raise UserError(
            f"data.root={root} has train/ but no test/: add test/, or move the class folders of train/ "
            "up into data.root to have them split"
        )
    names = _class_names(parts["train"])
    test_name = "test" if "test" in parts else "val"
    labelled: dict[str, Any] = {part: _labelled(folder, names) for part, folder in parts.items()}
    check_files(*(images.images.paths for images in labelled.values()))
    test, train = labelled[test_name], labelled["train"]
    if "val" in parts and test_name == "test":
        val = labelled["val"]
        return Splits(train, val, test, names, "train/, val/ and test/ as found", given=("val", "test"))
    kept, drawn = stratified_holdout(train.labels, data["val_fraction"], data["split_seed"], "data.val_fraction", names)
    note = f"test is {test_name}/; validation drawn from train/ with data.split_seed={data['split_seed']}"
    return Splits(train.select(kept), train.select(drawn), test, names, note, given=("test",))


def _from_one_tree(root: Path, data: schema.Data) -> Splits:
    names = _class_names(root)
    everything: Any = _labelled(root, names)
    check_files(everything.images.paths)
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
    inside = [_images(folder / name) if name in found else [] for name in names]
    empty = [str(folder / name) for name, files in zip(names, inside, strict=True) if not files]
    if empty and (folder.name == "train" or len(found) == len(names)):
        kinds = " ".join(sorted(EXTENSIONS))
        which = f"{empty[0]} has" if len(empty) == 1 else f"each of {len(empty)} class folders has"
        named = "" if len(empty) == 1 else f" ({first_few(empty)})"
        raise UserError(f"data.root: {which} no images{named}: each class needs files that end in {kinds}")
    files = [path for found_ in inside for path in found_]
    if not files:
        raise UserError(f"data.root: {folder} has no images: it takes {LAYOUT}")
    labels = [label for label, found_ in enumerate(inside) for _ in found_]
    return LabelledImages(ImageFiles(tuple(files)), tuple(labels))


def _images(folder: Path) -> list[Path]:
    """Image files below ``folder``, sorted by their path relative to it, so that every machine sees one order.

    Links to folders are followed, but none is visited twice, and none that ``folder`` itself lies in. A link that leads
    nowhere counts as a file, so that it is named as one that cannot be read.
    """
    parent, seen, files = Path(os.path.realpath(folder.parent)), set(), []

    def unreadable(error: OSError) -> None:
        raise UserError(
            f"data.root: {error.filename} cannot be read ({error.strerror}): allow it or remove it"
        ) from error

    for current, below, inside in os.walk(folder, followlinks=True, onerror=unreadable):
        real = Path(os.path.realpath(current))
        if real in seen or parent.is_relative_to(real):
            below.clear()
            continue
        seen.add(real)
        below.sort()
        files += [Path(current, name) for name in inside if _is_image(name) and _is_file(Path(current, name))]
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in EXTENSIONS and not name.startswith(".")


def _is_file(path: Path) -> bool:
    return path.is_file() or (path.is_symlink() and not path.exists())
