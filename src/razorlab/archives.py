"""Unpacking a tar archive that may be hostile.

The whole archive is read once before anything is written: every name, type and size is checked, so that a refused
archive leaves nothing behind. Only plain files and folders are unpacked; the published data sets hold nothing else.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from razorlab.errors import UserError

MAX_MEMBERS = 500_000
MAX_HEADER_BYTES = 1 << 20  # one extended header; larger ones serve only to fill memory
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError)


def unpack(archive: Path, into: Path, max_bytes: int, way_out: str) -> None:
    """Unpack the tar ``archive``, plain or gzipped, into the empty folder ``into``.

    Args:
        max_bytes: largest total size unpacked; more is taken for a decompression bomb.
        way_out: what the user can do; every error ends in it.

    Raises:
        UserError: the archive is truncated or damaged, too large, or a member is a link or a device or would leave
            ``into``; nothing has been written then. Or the disk is full.
    """
    try:
        _require_end(archive)
        with _opener(archive)(archive, "rb") as raw, tarfile.open(fileobj=_Bounded(raw, max_bytes), mode="r:") as tar:
            members = _checked_members(tar, archive, into, max_bytes)
            for member in tqdm(members, desc=f"unpack {archive.name}", unit="file", disable=None):
                _write(tar, member, into / member.name)
    except UserError as error:
        raise UserError(f"{error}; {way_out}") from error
    except _DAMAGED as error:
        raise UserError(f"{archive} is truncated or no tar archive ({error}); {way_out}") from error
    except OSError as error:
        raise UserError(f"{archive} cannot be unpacked into {into} ({error.strerror or error}); {way_out}") from error


def _opener(archive: Path) -> Callable[..., Any]:
    """What opens the archive: by its name, since damage may be where a gzip file says that it is one."""
    return open if archive.suffix == ".tar" else gzip.open


def _require_end(archive: Path) -> None:
    """Raise ``tarfile.ReadError`` where a plain archive lacks the zeros that end it, which tarfile overlooks. A gzipped
    one says by itself that it goes on."""
    if archive.suffix == ".tar":
        with archive.open("rb") as file:
            file.seek(max(archive.stat().st_size - 2 * tarfile.BLOCKSIZE, 0))
            if file.read() != bytes(2 * tarfile.BLOCKSIZE):
                raise tarfile.ReadError("its end is missing")


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, to: Path) -> None:
    """Write a checked member, with the permissions that any new file gets."""
    if member.isdir():
        to.mkdir(parents=True, exist_ok=True)
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    source = tar.extractfile(member)
    assert source is not None, member.name
    with source, to.open("wb") as target:
        shutil.copyfileobj(source, target)
        if target.tell() != member.size:
            raise tarfile.ReadError("unexpected end of data")


def _checked_members(tar: tarfile.TarFile, archive: Path, into: Path, max_bytes: int) -> list[tarfile.TarInfo]:
    """Return all members; the sizes are known to fit the limit and the disk."""
    members, total = [], 0
    for member in tar:  # stops before it skips over a body whose size is already too large
        _check_member(member, archive)
        total += member.size
        if total > max_bytes:
            raise UserError(_too_large(archive, max_bytes))
        members.append(member)
        if len(members) > MAX_MEMBERS:
            raise UserError(f"{archive} holds more than {MAX_MEMBERS} files")
    if not members:
        raise UserError(f"{archive} is empty")
    free = shutil.disk_usage(into).free
    if total > free:
        raise UserError(f"{archive} needs {total / 1e9:.2f} GB unpacked, {into} has {free / 1e9:.2f} GB free")
    return members


def _check_member(member: tarfile.TarInfo, archive: Path) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name:
        raise UserError(f"{archive}: member {member.name!r} would leave the folder it is unpacked into")
    if member.issym() or member.islnk():
        raise UserError(f"{archive}: member {member.name!r} is a link to {member.linkname!r}; links are not unpacked")
    if not (member.isdir() or member.isreg()) or member.issparse():
        raise UserError(f"{archive}: member {member.name!r} is neither a plain file nor a folder")


def _too_large(archive: Path, max_bytes: int) -> str:
    return f"{archive} unpacks to more than the {max_bytes / 1e9:.3f} GB that the published one may have"


class _Bounded(io.RawIOBase):
    """A readable, seekable stream that refuses to go beyond ``max_bytes`` plus the tar format's own share.

    ``tarfile`` reads an extended header whole, whatever size it claims, and gzip packs zeros a thousandfold.
    """

    def __init__(self, raw: Any, max_bytes: int) -> None:
        self.raw = raw
        self.max_bytes = max_bytes
        self.end = max_bytes + MAX_MEMBERS * 3 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.raw.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET or offset > self.end:
            raise UserError(_too_large(Path(self.raw.name), self.max_bytes))
        return self.raw.seek(offset)

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES or self.raw.tell() + size > self.end:
            raise UserError(f"{self.raw.name} claims a header of {size} bytes, at most {MAX_HEADER_BYTES} are allowed")
        return self.raw.read(size)
