"""CIFAR-10 and CIFAR-100, read without unpickling objects.

The published files are pickles written by Python 2 with NumPy. A pickle may name any function and have it called, so
the reader below knows three names, those that a NumPy array needs, and gives each a stand-in that only stores what it
gets.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from razorlab.data.published.spec import Archive, Listing, PublishedSpec
from razorlab.data.spec import LabelledImages
from razorlab.errors import UserError

SIDE = 32  # pixels
ROW_BYTES = 3 * SIDE * SIDE
MAX_FILE_BYTES = 256 << 20  # the largest published file, CIFAR-100's train, has 155 MB


class _Array:
    """Stand-in for a NumPy array: the state that the pickle would have given to it."""

    def __init__(self, *arguments: Any) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def rows(self) -> np.ndarray:
        """Return the stored images, (N, 3072) uint8.

        NumPy's state is (version, shape, dtype, in Fortran order or not, bytes); Python 2's bytes come as Latin-1 text.
        """
        _, shape, dtype, fortran, raw = self.state
        if not isinstance(dtype, _DType) or dtype.code not in ("u1", "|u1"):
            raise ValueError("the images are not of type uint8")
        if len(shape) != 2 or shape[1] != ROW_BYTES:
            raise ValueError(f"the images have shape {shape}, expected (N, {ROW_BYTES})")
        data = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
        return np.frombuffer(data, dtype=np.uint8).reshape(shape, order="F" if fortran else "C")


class _DType:
    """Stand-in for a NumPy dtype; ``code`` is its type code, as ``u1``."""

    def __init__(self, code: Any = None, *arguments: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and alignment: nothing that a byte has


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): None,  # only ever an argument
    ("numpy", "dtype"): _DType,
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs") from None


def read_pickle(path: Path) -> dict[str, Any]:
    """Return the dict in a CIFAR file; arrays come as stand-ins with ``rows()``. Nothing in the file is executed.

    Raises:
        UserError: the file is missing, truncated, too large, or asks for anything but a NumPy array.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
        with open(path, "rb") as file:
            content = _RestrictedUnpickler(file, encoding="latin1").load()
        if not isinstance(content, dict):
            raise ValueError("it holds no dict")
        return content
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, MemoryError) as error:
        raise UserError(f"{path} is not a CIFAR file ({error or type(error).__name__})") from error


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images held in memory, (N, 3, 32, 32) uint8."""

    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.pixels[index].transpose(1, 2, 0)))


def _read_files(folder: Path, names: tuple[str, ...], label_key: str) -> LabelledImages:
    images, labels = [], []
    for name in names:
        content = read_pickle(folder / name)
        if label_key not in content or not isinstance(content.get("data"), _Array):
            raise UserError(f"{folder / name} is not a CIFAR file (it lacks 'data' or {label_key!r})")
        images.append(content["data"].rows())
        labels += [int(label) for label in content[label_key]]
        if sum(map(len, images)) != len(labels):
            raise UserError(f"{folder / name} has {len(images[-1])} images and another number of labels")
    pixels = np.concatenate(images).reshape(-1, 3, SIDE, SIDE)
    return LabelledImages(ArrayImages(pixels), tuple(labels))


def _read(
    root: Path, folder: str, train: tuple[str, ...], test: str, meta: str, label_key: str, names_key: str
) -> Listing:
    inside = root / folder
    names = read_pickle(inside / meta)[names_key]
    return Listing(
        train=_read_files(inside, train, label_key),
        test=_read_files(inside, (test,), label_key),
        class_names=tuple(str(name) for name in names),
    )


_TRAIN_10 = tuple(f"data_batch_{i}" for i in range(1, 6))
_FOLDER_10, _FOLDER_100 = "cifar-10-batches-py", "cifar-100-python"

CIFAR10 = PublishedSpec(
    name="cifar10",
    classes=10,
    train=50_000,
    test=10_000,
    archives=(
        Archive(
            name="cifar-10-python.tar.gz",
            md5="c58f30108f718f92721af3b95e74349a",
            url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            into="",
            makes=_FOLDER_10,
            labels=tuple(f"{_FOLDER_10}/{name}" for name in (*_TRAIN_10, "test_batch", "batches.meta")),
        ),
    ),
    read=partial(
        _read,
        folder=_FOLDER_10,
        train=_TRAIN_10,
        test="test_batch",
        meta="batches.meta",
        label_key="labels",
        names_key="label_names",
    ),
    source="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
)

CIFAR100 = PublishedSpec(
    name="cifar100",
    classes=100,
    train=50_000,
    test=10_000,
    archives=(
        Archive(
            name="cifar-100-python.tar.gz",
            md5="eb9058c3a382ffc7106e4002c42a8d85",
            url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
            into="",
            makes=_FOLDER_100,
            labels=tuple(f"{_FOLDER_100}/{name}" for name in ("train", "test", "meta")),
        ),
    ),
    read=partial(
        _read,
        folder=_FOLDER_100,
        train=("train",),
        test="test",
        meta="meta",
        label_key="fine_labels",
        names_key="fine_label_names",
    ),
    source=CIFAR10.source,
)
