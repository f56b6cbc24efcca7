"""Reading the names in a .npz file that may be hostile."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

MAX_NPZ_BYTES = 4 << 30  # unpacked; ViT-B/16 with its 21,843-class head has 0.4e9
DAMAGED_NPZ = (OSError, ValueError, LookupError, MemoryError, EOFError, zipfile.BadZipFile, zlib.error)


def npz_names(file: Path) -> set[str]:
    """Return the names of the arrays in ``file`` once all were read: each as long as it claims, none a pickle.

    Raises:
        ValueError: it unpacks to more than ``MAX_NPZ_BYTES``, or an array is a pickle or shorter than it claims. Of a
            file damaged otherwise, any of ``DAMAGED_NPZ``.
    """
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > MAX_NPZ_BYTES:
        raise ValueError(f"it unpacks to {unpacked} bytes, at most {MAX_NPZ_BYTES} are allowed")
    with np.load(file, allow_pickle=False) as arrays:
        for name in arrays.files:
            arrays[name]  # reads it, and so checks its stored checksum
        return set(arrays.files)
