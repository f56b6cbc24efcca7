"""pretrain/fetch.py on small weights files behind a local server."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import timm
import torch
from dataset_helpers import REPOSITORY, load_script, one_error

from razorlab.models.zoo import BACKBONES

fetch = load_script("pretrain/fetch.py")


def pth(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


GOOD = {
    "proxyless_mobile.pth": pth({"state_dict": {"first_conv.weight": torch.arange(4.0)}}),
    "ViT-B_16.npz": npz(**{"embedding/kernel": np.arange(6.0, dtype=np.float32)}),
    "resnet18-f37072fd.pth": pth({"conv1.weight": torch.ones(2)}),
}


@pytest.fixture
def home(server, tmp_path):
    """A pretrain folder whose files come from the local server; the small resnet18 has a checksum of its own."""
    server.files = dict(GOOD)
    rows = json.loads((REPOSITORY / "pretrain/checksums.json").read_text())
    for row in rows.values():
        row["url"] = f"{server.url}/{row['file']}"
    rows["resnet18"]["sha256"] = hashlib.sha256(GOOD["resnet18-f37072fd.pth"]).hexdigest()[:8]
    (tmp_path / "checksums.json").write_text(json.dumps(rows))
    return tmp_path


def known(home, name):
    return json.loads((home / "checksums.json").read_text())[name]


def test_list_names_every_file_and_its_state(home, capsys):
    (home / "resnet18-f37072fd.pth").write_bytes(b"")
    (home / "ViT-B_16.npz.part").write_bytes(bytes(2_000_000))
    assert fetch.main(["--list"], home) == fetch.main([], home) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert " here " in rows["resnet18"] and "2.0 MB of it" in rows["vit_b16"] and " missing " in rows["proxylessnas"]
    assert known(home, "vit_b16")["sha256"] is None


def test_download_with_a_published_checksum(home, server, capsys):
    assert fetch.main(["resnet18"], home) == 0
    assert (home / "resnet18-f37072fd.pth").read_bytes() == GOOD["resnet18-f37072fd.pth"]
    server.seen.clear()
    assert fetch.main(["resnet18"], home) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert server.seen == []
    server.files["resnet18-f37072fd.pth"] = GOOD["proxyless_mobile.pth"]
    (home / "resnet18-f37072fd.pth").unlink()
    assert fetch.main(["resnet18"], home) == 2
    assert "is not" in one_error(capsys)
    assert not list(home.glob("resnet18*"))


@pytest.mark.parametrize("name", ["vit_b16", "proxylessnas"])
def test_the_first_checksum_is_recorded_and_trusted_from_then_on(name, home, capsys):
    assert fetch.main([name], home) == 0
    path = home / known(home, name)["file"]
    assert known(home, name)["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "recorded at first download" in known(home, name)["source"]
    assert "no checksum is published" in capsys.readouterr().out
    assert fetch.main(["--verify"], home) == 0
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert fetch.main(["--verify", name], home) == 2
    assert known(home, name)["sha256"] in one_error(capsys)


def test_a_file_placed_by_hand_is_verified_and_recorded(home, server):
    (home / "ViT-B_16.npz").write_bytes(GOOD["ViT-B_16.npz"])
    assert fetch.main(["vit_b16"], home) == 0
    assert server.seen == []
    assert "recorded at first sight" in known(home, "vit_b16")["source"]


def test_an_interrupted_download_goes_on(home, server, capsys):
    server.cut_after = 20
    assert fetch.main(["proxylessnas"], home) == 2
    assert "bytes are kept in" in one_error(capsys)
    server.cut_after = None
    assert fetch.main(["proxylessnas"], home) == 0
    assert server.seen[-1][1] == "bytes=100-"


class _Touch:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def _zip_bomb():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("embedding/kernel.npy", bytes(3_000_000))
    return buffer.getvalue()


UNFIT = {
    "a pickle that calls": ("proxylessnas", lambda marker: pickle.dumps({"state_dict": _Touch(marker)})),
    "a torch file that calls": ("proxylessnas", lambda marker: pth({"state_dict": _Touch(marker)})),
    "objects in npz": ("vit_b16", lambda marker: npz(**{"embedding/kernel": np.array([_Touch(marker)], dtype=object)})),
    "a pickle named npz": ("vit_b16", lambda marker: pickle.dumps(_Touch(marker))),
    "npz bomb": ("vit_b16", lambda marker: _zip_bomb()),
    "other tensors": ("vit_b16", lambda marker: npz(other=np.ones(3))),
    "truncated npz": ("vit_b16", lambda marker: GOOD["ViT-B_16.npz"][:-30]),
    "truncated pth": ("proxylessnas", lambda marker: GOOD["proxyless_mobile.pth"][:300]),
    "a web page": ("proxylessnas", lambda marker: b"<html>sign in</html>"),
    "empty": ("vit_b16", lambda marker: b""),
    "no tensors": ("proxylessnas", lambda marker: pth({"state_dict": {"epoch": 3}})),
    "a list": ("proxylessnas", lambda marker: pth([1, 2])),
}


@pytest.mark.parametrize("case", UNFIT)
@pytest.mark.parametrize("by_hand", [False, True], ids=["downloaded", "by hand"])
def test_unfit_files(case, by_hand, home, server, tmp_path, capsys, monkeypatch):
    """One line, nothing executed, nothing recorded, and what was downloaded is gone."""
    monkeypatch.setattr("razorlab.npz.MAX_NPZ_BYTES", 2_000_000)
    name, make = UNFIT[case]
    raw, file = make(tmp_path / "executed"), known(home, name)["file"]
    if by_hand:
        (home / file).write_bytes(raw)
    else:
        server.files[file] = raw
    assert fetch.main([name], home) == 2
    assert "does not read as weights" in one_error(capsys)
    assert not (tmp_path / "executed").exists()
    assert known(home, name)["sha256"] is None
    assert by_hand or not list(home.glob(f"{file}*"))


def test_wrong_words(home, capsys):
    assert fetch.main(["resnet19"], home) == 2
    assert "NAME=resnet19 is not allowed: vit_b16|" in one_error(capsys)
    assert fetch.main(["--verify", "resnet50"], home) == 2
    assert "0676ba61" in one_error(capsys)
    (home / "checksums.json").write_text("{")
    assert fetch.main(["--list"], home) == 2
    assert "restore it from the repository" in one_error(capsys)


@pytest.mark.parametrize("name", ["mobilenetv2", "resnet18", "resnet50", "tinytl", "vit_b16"])
def test_what_is_fetched_is_what_the_backbone_looks_for(name):
    row = fetch.read_catalogue(REPOSITORY / "pretrain")[name]
    assert (BACKBONES[name]().weights_file, BACKBONES[name]().url) == (row.file, row.url)


def test_the_committed_rows_are_timms():
    """Address and checksum digits of every row that comes from timm are those that timm publishes."""
    rows = fetch.read_catalogue(REPOSITORY / "pretrain")
    assert {"vit_b16", "proxylessnas", "mobilenetv2", "resnet18", "resnet50"} <= rows.keys()
    for row in rows.values():
        assert row.url.endswith(f"/{row.file}")
        if row.timm is not None:
            assert timm.get_pretrained_cfg(row.timm).url == row.url
            assert row.file.rpartition("-")[2] == f"{row.sha256}.pth"
