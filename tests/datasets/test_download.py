"""Downloads against a server with faults."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

import razorlab.download
from razorlab.download import Checksum, download
from razorlab.errors import UserError

BODY = bytes(range(256)) * 200  # 51,200 bytes
MD5 = Checksum("md5", hashlib.md5(BODY).hexdigest())
OTHER = bytes(51_200)


@pytest.fixture
def target(server, tmp_path):
    server.files["file.bin"] = BODY
    return tmp_path / "new folder/file.bin"


def test_whole(server, target):
    download(f"{server.url}/file.bin", target, MD5)
    assert target.read_bytes() == BODY
    assert list(target.parent.iterdir()) == [target]


def test_each_attempt_goes_on_from_the_last(server, target):
    server.cut_after = 20_000
    download(f"{server.url}/file.bin", target, MD5)
    assert target.read_bytes() == BODY
    assert [wanted for _, wanted in server.seen] == [None, "bytes=20000-", "bytes=40000-"]


def test_goes_on_after_sigkill(server, target):
    server.chunk_pause = 0.005
    part = target.with_name("file.bin.part")
    code = (
        "import sys, pathlib, razorlab.download as module; module.CHUNK = 1000; "
        "module.download(sys.argv[1], pathlib.Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, f"{server.url}/file.bin", str(target)]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 0) and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    have = part.stat().st_size
    assert 0 < have < len(BODY) and not target.exists()
    server.chunk_pause = 0.0
    download(f"{server.url}/file.bin", target, MD5)
    assert target.read_bytes() == BODY
    assert server.seen[-1] == ("/file.bin", f"bytes={have}-")


def test_a_server_without_ranges(server, target):
    server.ranges = False
    target.parent.mkdir()
    target.with_name("file.bin.part").write_bytes(BODY[:1000])
    download(f"{server.url}/file.bin", target, MD5)
    assert target.read_bytes() == BODY


def test_a_new_version_on_the_server_is_not_joined_to_the_old(server, target):
    server.cut_after = 1000
    with pytest.raises(UserError):
        download(f"{server.url}/file.bin", target)
    server.files["file.bin"], server.etag, server.cut_after = OTHER, '"second"', None
    download(f"{server.url}/file.bin", target)
    assert target.read_bytes() == OTHER


def test_a_complete_part_needs_no_more_bytes(server, target):
    target.parent.mkdir()
    target.with_name("file.bin.part").write_bytes(BODY)
    download(f"{server.url}/file.bin", target, MD5)
    assert target.read_bytes() == BODY


@pytest.mark.parametrize("junk", [b"junk" * 10, b"junk" * 20_000], ids=["short", "longer than the file"])
def test_a_part_of_something_else_is_fetched_anew(junk, server, target):
    target.parent.mkdir()
    target.with_name("file.bin.part").write_bytes(junk)
    download(f"{server.url}/file.bin", target, MD5)
    assert target.read_bytes() == BODY


def test_wrong_checksum_leaves_nothing(server, target):
    server.files["file.bin"] = OTHER
    with pytest.raises(UserError, match=f"is not {MD5.digest}; it was removed"):
        download(f"{server.url}/file.bin", target, MD5)
    assert list(target.parent.iterdir()) == []


def test_the_first_digits_of_a_checksum_do(server, target):
    download(f"{server.url}/file.bin", target, Checksum("sha256", hashlib.sha256(BODY).hexdigest()[:8]))
    assert target.exists()


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (503, 5)])
def test_refusals(status, requests, server, target):
    server.status = status
    with pytest.raises(UserError, match=rf"answered {status} .*place the file at .*file.bin by hand \(MD5"):
        download(f"{server.url}/file.bin", target, MD5)
    assert len(server.seen) == requests


def test_no_server(target, monkeypatch):
    monkeypatch.setattr(razorlab.download, "ATTEMPTS", 1)
    with pytest.raises(UserError, match="could not be downloaded"):
        download("http://127.0.0.1:9/file.bin", target, MD5)


def test_no_room(server, target, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="make room"):
        download(f"{server.url}/file.bin", target, MD5)


def test_a_refused_file_is_removed(server, target):
    def refuse(part):
        assert part.read_bytes() == BODY
        raise UserError("unfit")

    with pytest.raises(UserError, match="unfit"):
        download(f"{server.url}/file.bin", target, accept=refuse)
    assert list(target.parent.iterdir()) == []
