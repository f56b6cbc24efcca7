"""Makers of files that mean harm or are merely broken; each writes below the folder that it is given."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from conftest import write_image, write_tree
from PIL import Image

MARKER = "executed"  # a file of this name in the current folder: code of a hostile file has run


class _Call:
    """Pickles to a call of ``os.system``."""

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.system, (f"touch {MARKER}",)


def pickled() -> bytes:
    """A pickle that runs a command when it is loaded."""
    return pickle.dumps({"state_dict": _Call()}, 2)


def torch_pickled() -> bytes:
    """The same in torch's zip format."""
    buffer = io.BytesIO()
    torch.save({"state_dict": _Call()}, buffer)
    return buffer.getvalue()


def torch_file(value: object) -> bytes:
    """What ``torch.save`` writes for ``value``."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def npz(**arrays: bytes) -> bytes:
    """A .npz of raw members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in arrays.items():
            archive.writestr(f"{name}.npy", raw)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    """An array in NumPy's format, a pickle where its type is object."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def npy_claiming(shape: tuple[int, ...]) -> bytes:
    """A header that claims ``shape`` in float32, and no data."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def safetensors(header: object, size: int | None = None) -> bytes:
    """A .safetensors of a header alone; ``size`` is the length that it claims."""
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if size is None else size) + raw


def png(width: int, height: int, data: bytes = b"", chunks: bytes = b"") -> bytes:
    """A PNG of any claimed size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    text = chunk(b"zTXt", b"x\0\0" + chunks) if chunks else b""
    return b"\x89PNG\r\n\x1a\n" + header + text + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def encoded(kind: str, side: int = 32) -> bytes:
    """A proper image of ``side`` pixels in the format ``kind``."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def weights(name: str, raw: bytes) -> Callable[[Path], object]:
    """Place ``raw`` as a weights file."""

    def prepare(root: Path) -> None:
        root.mkdir()
        (root / name).write_bytes(raw)

    return prepare


def tree_with(name: str, raw: bytes) -> Callable[[Path], object]:
    """An image tree with ``raw`` as one more image of its first class."""

    def prepare(root: Path) -> None:
        write_tree(root)
        (root / "class0" / name).write_bytes(raw)

    return prepare


def stray_files(root: Path) -> None:
    """No image at all among thousands of files."""
    for label in ("class0", "class1"):
        (root / label).mkdir(parents=True)
        for index in range(1500):
            (root / label / f"notes{index}.txt").touch()


def stray_classes(root: Path) -> None:
    """Two proper classes among a thousand empty folders."""
    write_tree(root)
    for index in range(1000):
        (root / f"empty{index:04}").mkdir()


def files_in_place_of_classes(root: Path) -> None:
    """Images that lie in the root itself."""
    for index in range(20):
        write_image(root / f"{index}.png", seed=index)


def link_to_a_text(root: Path) -> None:
    """An image that is a link to a file elsewhere, which is no image."""
    write_tree(root)
    (root / "class0" / "linked.png").symlink_to("/etc/passwd")


def class_is_a_loop(root: Path) -> None:
    """A class folder that is a link to its own parent."""
    write_tree(root, classes=1)
    (root / "class1").symlink_to(root, target_is_directory=True)
    (root / "class2").mkdir()


def pipes_in_place_of_images(root: Path) -> None:
    """A class of named pipes: reading one would wait for ever."""
    write_tree(root, classes=1)
    (root / "class1").mkdir()
    for index in range(3):
        os.mkfifo(root / "class1" / f"{index}.png")
