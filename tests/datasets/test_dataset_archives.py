"""Archives and pickles made to do harm: each ends in one line, and nothing is written beside its target."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
from dataclasses import replace

import pytest
from dataset_helpers import snapshot
from tiny_archives import python2_pickle, tar_gz, with_checksums

import razorlab.archives
from razorlab.archives import unpack
from razorlab.data.published import PUBLISHED, build
from razorlab.data.published.install import install
from razorlab.errors import UserError

LIMIT = 1_000_000  # bytes unpacked


def entry(name, kind=tarfile.REGTYPE, link="", size=0):
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, size
    return member


def archive(*members):
    """A gzipped tar of (TarInfo, content) or TarInfo."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member in members:
            member, content = member if isinstance(member, tuple) else (member, b"")
            member.size = len(content) or member.size
            tar.addfile(member, io.BytesIO(content) if content else None)
    return buffer.getvalue()


def huge_header():
    """An extended header that claims 300 MB: a reader that trusts it fills the memory."""
    member = entry("x", tarfile.XHDTYPE, size=300 << 20)
    return gzip.compress(member.tobuf(tarfile.USTAR_FORMAT) + bytes(1 << 20))


def claims_much():
    """A body of 1 TB that is not there."""
    return gzip.compress(entry("cifar-10-batches-py/a", size=10**12).tobuf(tarfile.GNU_FORMAT) + bytes(10_240))


def sparse():
    """A sparse member: a terabyte of holes in one block."""
    member = entry("cifar-10-batches-py/a", tarfile.GNUTYPE_SPARSE)
    raw = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    raw[386:398], raw[398:410], raw[483:495] = b"00000000000\0", b"00000000000\0", b"10000000000\0"
    raw[148:156] = b" " * 8
    raw[148:156] = f"{sum(raw):06o}\0 ".encode()
    return gzip.compress(bytes(raw) + bytes(10_240))


INSIDE = (entry("cifar-10-batches-py/a"), b"content")
HOSTILE = {
    "parent": (archive(INSIDE, (entry("../evil"), b"x")), "would leave"),
    "deep parent": (archive(INSIDE, (entry("cifar-10-batches-py/b/../../../evil"), b"x")), "would leave"),
    "absolute": (archive(INSIDE, (entry("/tmp/evil-of-backrazor"), b"x")), "would leave"),
    "backslash": (archive(INSIDE, (entry("..\\evil"), b"x")), "would leave"),
    "symlink out": (archive(INSIDE, entry("s", tarfile.SYMTYPE, "/etc")), "links are not unpacked"),
    "symlink, then through it": (
        archive(entry("s", tarfile.SYMTYPE, ".."), (entry("s/evil"), b"x")),
        "links are not unpacked",
    ),
    "symlink inside": (archive(INSIDE, entry("s", tarfile.SYMTYPE, "cifar-10-batches-py/a")), "links are not unpacked"),
    "hard link": (archive(INSIDE, entry("h", tarfile.LNKTYPE, "../../outside")), "links are not unpacked"),
    "device": (archive(INSIDE, entry("d", tarfile.CHRTYPE)), "neither a plain file nor a folder"),
    "fifo": (archive(INSIDE, entry("f", tarfile.FIFOTYPE)), "neither a plain file nor a folder"),
    "bomb": (archive((entry("cifar-10-batches-py/zeros"), bytes(LIMIT + 1))), "unpacks to more than"),
    "many halves of a bomb": (
        archive(*((entry(f"cifar-10-batches-py/{i}"), bytes(LIMIT // 4)) for i in range(5))),
        "unpacks to more than",
    ),
    "claimed terabyte": (claims_much(), "unpacks to more than"),
    "huge header": (huge_header(), "claims a header"),
    "sparse": (sparse(), "neither a plain file nor a folder"),
    "not gzip": (b"<html>moved</html>", "truncated or no tar"),
    "gzip of no tar": (gzip.compress(b"not a tar archive" * 100), "truncated or no tar"),
    "empty file": (b"", "truncated or no tar"),
    "empty tar": (archive(), "is empty"),
    "something else": (archive((entry("holiday/a"), b"x")), "holds no cifar-10-batches-py"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archive(case, tmp_path):
    """Even with the right checksum nothing leaves the target, and no half data set stays."""
    raw, reason = HOSTILE[case]
    root = tmp_path / "inner/data/cifar10"
    root.mkdir(parents=True)
    (root / "cifar-10-python.tar.gz").write_bytes(raw)
    spec = with_checksums(PUBLISHED["cifar10"], root)
    spec = replace(spec, archives=tuple(replace(a, max_bytes=LIMIT) for a in spec.archives))
    with pytest.raises(UserError, match=reason) as error:
        install(spec, root, say=lambda line: None)
    assert "\n" not in str(error.value) and "cifar-10-python.tar.gz" in str(error.value)
    left = {path.relative_to(root).parts[0] for path in tmp_path.rglob("*") if root in path.parents}
    assert left <= {"cifar-10-python.tar.gz", ".setup.lock", ".unpacking"}
    assert not [path for path in tmp_path.rglob("*") if root not in path.parents and path not in (root, *root.parents)]
    if case != "something else":
        assert list((root / ".unpacking").iterdir()) == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_truncated_archive(name, tiny, tmp_path):
    """Cut off in the middle, with a checksum that fits the cut file."""
    folder = tiny[name].place(tmp_path)
    file = next(folder / a.name for a in tiny[name].spec.archives if not a.is_plain)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{file.name} is truncated"):
        install(with_checksums(tiny[name].spec, folder), folder, say=lambda line: None)


def test_too_many_members(tmp_path, monkeypatch):
    monkeypatch.setattr(razorlab.archives, "MAX_MEMBERS", 5)
    tar_gz(tmp_path / "a.tgz", {f"a/{i}": b"x" for i in range(6)})
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="more than 5 files"):
        unpack(tmp_path / "a.tgz", tmp_path / "out", LIMIT, "stop")
    assert snapshot(tmp_path / "out") == {}


def test_modes_and_owners_are_not_taken_over(tmp_path):
    member = entry("a/run")
    member.mode, member.uid, member.gid = 0o6777, 0, 0
    (tmp_path / "a.tgz").write_bytes(archive((member, b"x")))
    (tmp_path / "out").mkdir()
    unpack(tmp_path / "a.tgz", tmp_path / "out", LIMIT, "stop")
    assert (tmp_path / "out/a/run").stat().st_mode & 0o7022 == 0


class _Call:
    """Pickles to a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def _hostile_pickles(marker):
    touch = f"touch {marker}"
    return {
        "os.system": pickle.dumps(_Call(os.system, touch), 2),
        "eval": pickle.dumps({"data": _Call(eval, f"__import__('os').system({touch!r})")}, 2),
        "no end": b"\x80\x02}",
        "empty": b"",
        "list": python2_pickle([1, 2]),
    }


@pytest.mark.parametrize("file", ["data_batch_3", "batches.meta"])
@pytest.mark.parametrize("case", _hostile_pickles("x"))
def test_hostile_cifar_pickle(case, file, tiny, tmp_path):
    """In an archive whose checksum fits; named in set-up and when the set is read, and never run."""
    marker = tmp_path / "executed"
    raw = _hostile_pickles(marker)[case]
    folder = tmp_path / "cifar10"
    folder.mkdir()
    with tarfile.open(tiny["cifar10"].files / "cifar-10-python.tar.gz") as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar if m.isreg()}
    members[f"cifar-10-batches-py/{file}"] = raw
    tar_gz(folder / "cifar-10-python.tar.gz", members)
    spec = with_checksums(tiny["cifar10"].spec, folder)
    with pytest.raises(UserError, match=f"{file} is damaged or another version") as error:
        install(spec, folder, say=lambda line: None)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        build(spec, folder, "train")
    assert not marker.exists()
