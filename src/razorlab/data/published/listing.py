"""Reading a published data set's labels, and saying what is wrong with what lies on disk."""

from __future__ import annotations

import os
import pickle
import zlib
from collections import Counter
from pathlib import Path

from scipy.io.matlab import MatReadError

from razorlab.data.images import ImageFiles
from razorlab.data.masks import MaskFiles
from razorlab.data.published.spec import Archive, Listing, PublishedSpec
from razorlab.data.spec import LabelledImages
from razorlab.errors import UserError, one_line

_UNREADABLE = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError),
    *(OSError, EOFError, RuntimeError, zlib.error, pickle.UnpicklingError, MatReadError),
)


def missing_files(spec: PublishedSpec, root: Path) -> list[str]:
    """Return one line for each published file whose result is not under ``root``, or is a label file with damage."""
    problems = []
    for archive in spec.archives:
        made = archive.made(root)
        wanted = [made] + [root / archive.into / label for label in archive.labels]
        absent = next((path for path in wanted if not path.exists()), None)
        if absent is not None:
            problems.append(f"{absent} is missing (from {archive.name}, {archive.checksum})")
        elif archive.is_plain and not archive.checksum.matches(made):
            problems.append(f"{made} is damaged or another version (expected {archive.checksum})")
    return problems


def read_listing(spec: PublishedSpec, root: Path) -> Listing:
    """Return the images and labels under ``root``. No image is opened.

    Raises:
        UserError: a file is missing or damaged, with its checksum and the command that brings it.
    """
    problems = missing_files(spec, root)
    if problems:
        raise UserError(f"data={spec.name}: {problems[0]}: run {command(spec, root)}")
    try:
        return _parse(spec, root)
    except UserError as error:
        raise UserError(f"data={spec.name}: {error}: run {command(spec, root, '--repair')}") from error


def _parse(spec: PublishedSpec, root: Path) -> Listing:
    try:
        listing = spec.read(root)
        for part in (listing.train, listing.test):
            _check_part(part, listing, root)
    except _UNREADABLE as error:
        raise UserError(f"the label files under {root} cannot be read ({one_line(error)})") from error
    return listing


def _check_part(part: LabelledImages, listing: Listing, root: Path) -> None:
    if not len(part):
        raise ValueError("a split is empty")
    classes = len(listing.class_names)
    if classes and not 0 <= min(part.labels) <= max(part.labels) < classes:
        raise ValueError(f"labels run from {min(part.labels)} to {max(part.labels)}, there are {classes} classes")
    inside = os.path.abspath(root) + os.sep
    for path in (*file_paths(part), *mask_paths(part)):
        if not os.path.abspath(path).startswith(inside):
            raise ValueError(f"they name an image outside the data set, {path}")


def file_paths(part: LabelledImages) -> tuple[Path, ...]:
    """The image files of ``part``; none where the images are held in memory."""
    return part.images.paths if isinstance(part.images, ImageFiles) else ()


def mask_paths(part: LabelledImages) -> tuple[Path, ...]:
    """The mask files of ``part``; none where it has no masks."""
    return part.masks.paths if isinstance(part.masks, MaskFiles) else ()


def find_problems(spec: PublishedSpec, root: Path) -> list[str]:
    """Count files, images and classes against the published figures; return one line for each thing that is wrong."""
    problems = missing_files(spec, root)
    if problems:
        return problems
    try:
        listing = _parse(spec, root)
    except UserError as error:
        return [str(error)]
    names = listing.class_names or listing.mask_names
    if len(names) != spec.classes:
        problems.append(f"{len(names)} classes, expected {spec.classes}")
    for name, part, expected in (("train", listing.train, spec.train), ("test", listing.test, spec.test)):
        if len(part) != expected:
            problems.append(f"{len(part)} {name} images, expected {expected}")
        unseen = set(range(len(listing.class_names))) - Counter(part.labels).keys()
        if unseen:
            problems.append(f"{len(unseen)} classes without {name} images, first {listing.class_names[min(unseen)]!r}")
        problems += _bad_files(f"{name} images", file_paths(part)) + _bad_files(f"{name} masks", mask_paths(part))
    shared = set(file_paths(listing.train)) & set(file_paths(listing.test))
    if shared:
        problems.append(f"{len(shared)} images are in train and in test, first {min(shared)}")
    return problems


def _bad_files(what: str, paths: tuple[Path, ...]) -> list[str]:
    bad = [path for path in paths if not _has_bytes(path)]
    return [f"{len(bad)} of {len(paths)} {what} are missing or empty, first {bad[0]}"] if bad else []


def _has_bytes(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def place_by_hand(archive: Archive, root: Path) -> str:
    """Say where a published file is expected and how it is recognised."""
    return f"{root / archive.name} ({archive.checksum})"


def command(spec: PublishedSpec, root: Path, option: str = "") -> str:
    """The set-up command for a data set whose folder is ``root``."""
    place = f"--root {root.parent}" if root.name == spec.name else f"--folder {root}"
    return f"`{spec.command} {place}{option and ' '}{option}`"
