"""Downloads that survive an interruption and are never half there.

Bytes go to ``<target>.part``; a later call goes on where the last one stopped. The file takes its real name only once
it is complete and its checksum is right, so whoever finds it may use it.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from razorlab.errors import UserError

CHUNK = 1 << 20  # bytes
TIMEOUT_SECONDS = 60.0  # without a byte
PAUSE_SECONDS = 1.0  # before the second attempt, then one more each time
ATTEMPTS = 5  # connections before giving up; each goes on from the last
_LOST = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError)


@dataclass(frozen=True)
class Checksum:
    """A published checksum: ``algorithm`` as hashlib names it, ``digest`` in lower-case hex, whole or its beginning."""

    algorithm: str
    digest: str

    def __str__(self) -> str:
        return f"{self.algorithm.upper()} {self.digest}"

    def matches(self, path: Path) -> bool:
        """Whether the file at ``path`` has this checksum."""
        return digest(path, self.algorithm).startswith(self.digest)

    def require(self, path: Path, way_out: str) -> None:
        """Raise ``UserError`` that names both checksums and ends in ``way_out`` where the file has another one."""
        found = digest(path, self.algorithm)
        if not found.startswith(self.digest):
            raise UserError(
                f"{path}: {self.algorithm.upper()} is {found}, expected {self.digest}: the file is incomplete, "
                f"damaged or another version; {way_out}"
            )


def digest(path: Path, algorithm: str) -> str:
    """Return the hex digest of a file. A checksum finds damage here; it is no signature."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def download(
    url: str, target: Path, checksum: Checksum | None = None, accept: Callable[[Path], None] | None = None
) -> None:
    """Bring ``url`` to ``target``, going on from ``<target>.part`` where an earlier call left one.

    Args:
        accept: looks into the complete file before it gets its name and raises ``UserError`` where it is unfit.

    Raises:
        UserError: no connection, an answer other than the file, a full disk, a wrong checksum, or ``accept``'s.
    """
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    resumed = part.exists() and part.stat().st_size > 0
    _transfer_all(url, part, target, checksum)
    if checksum is not None and not checksum.matches(part):
        _forget(part)
        if not resumed:
            raise UserError(
                f"{url}: {checksum.algorithm.upper()} of what arrived is not {checksum.digest}; it was removed: run "
                f"the command again, or place the published file at {target} by hand"
            )
        download(url, target, checksum, accept)  # the beginning was of another version or damaged: once more, all of it
        return
    if accept is not None:
        try:
            accept(part)
        except UserError:
            _forget(part)
            raise
    os.replace(part, target)
    _tag_file(part).unlink(missing_ok=True)


def _transfer_all(url: str, part: Path, target: Path, checksum: Checksum | None) -> None:
    by_hand = f"or place the file at {target} by hand" + (f" ({checksum})" if checksum else "")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _transfer(url, part)
            return
        except _LOST as error:
            if isinstance(error, urllib.error.HTTPError) and (error.code < 500 or attempt == ATTEMPTS):
                raise UserError(f"{url} answered {error.code} {error.reason}: try again later, {by_hand}") from error
            if attempt == ATTEMPTS:
                kept = part.stat().st_size if part.exists() else 0
                reason = getattr(error, "reason", None) or error or type(error).__name__
                raise UserError(
                    f"{url} could not be downloaded ({reason}): {kept} bytes are kept in {part}; run the command again "
                    f"to go on, {by_hand}"
                ) from error
            time.sleep(PAUSE_SECONDS * attempt)
        except OSError as error:
            raise UserError(
                f"{part} cannot be written ({error.strerror}): make room or choose another folder"
            ) from error


def _transfer(url: str, part: Path) -> None:
    """Append what ``part`` lacks of ``url``. Raises one of ``_LOST`` where the connection ends too early."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "backrazor"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        if _tag_file(part).exists():
            request.add_header("If-Range", _tag_file(part).read_text())
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return  # nothing is left to fetch
        _forget(part)
        have, response = 0, urllib.request.urlopen(urllib.request.Request(url), timeout=TIMEOUT_SECONDS)
    with response:
        if have and not (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
            have = 0  # the server sends the whole file
        _save_tag(part, response.headers.get("ETag"))
        length = response.headers.get("Content-Length")
        total = have + int(length) if length and length.isdigit() else None
        _check_room(part, total, have)
        with (
            open(part, "r+b" if have else "wb") as file,
            tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True, disable=None) as bar,
        ):
            file.seek(have)
            while block := response.read(CHUNK):
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
            written = file.tell()
    if total is not None and written != total:
        raise ConnectionError(f"the connection ended after {written} of {total} bytes")


def _check_room(part: Path, total: int | None, have: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - have > free:
        raise UserError(
            f"{part} needs {(total - have) / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free: make room or choose "
            "another folder"
        )


def _tag_file(part: Path) -> Path:
    """Where the server's name of this version of the file is kept, so that two versions are never joined."""
    return part.with_name(part.name + ".etag")


def _save_tag(part: Path, tag: str | None) -> None:
    if tag and not tag.startswith("W/"):  # a weak tag may not be used for ranges (RFC 9110, 13.1.5)
        _tag_file(part).write_text(tag)
    else:
        _tag_file(part).unlink(missing_ok=True)


def _forget(part: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        part.unlink()
    _tag_file(part).unlink(missing_ok=True)
