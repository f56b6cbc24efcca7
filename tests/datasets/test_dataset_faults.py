"""What can be wrong with a published data set on disk: each ends in one line and exit code 2."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from dataset_helpers import REPOSITORY, one_error, run, snapshot
from tiny_archives import MAKERS, mat, tar_gz, with_checksums

from razorlab.data.published import PUBLISHED, build
from razorlab.data.published.listing import read_listing
from razorlab.errors import UserError

NAMES = tuple(MAKERS)


def test_cars_have_to_be_placed_by_hand(setup_main, tmp_path, capsys):
    assert run(setup_main, PUBLISHED["cars"], tmp_path) == 2
    line = one_error(capsys)
    for archive in PUBLISHED["cars"].archives:
        assert archive.name in line and archive.md5 in line
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("name", NAMES)
def test_wrong_checksum(name, tiny, setup_main, tmp_path, capsys):
    spec = tiny[name].spec
    folder = tiny[name].place(tmp_path)
    damaged = folder / spec.archives[-1].name
    damaged.write_bytes(damaged.read_bytes()[:-7])
    assert run(setup_main, spec, tmp_path) == 2
    line = one_error(capsys)
    assert str(damaged) in line and spec.archives[-1].md5 in line and "delete it" in line
    assert hashlib.md5(damaged.read_bytes()).hexdigest() in line
    assert not spec.archives[-1].made(folder).exists()


LABEL_FILES = [(name, label) for name in NAMES for archive in PUBLISHED[name].archives for label in archive.labels]
LABEL_FILES += [(name, archive.name) for name in NAMES for archive in PUBLISHED[name].archives if archive.is_plain]


@pytest.mark.parametrize(("name", "label"), LABEL_FILES)
def test_missing_label_file(name, label, tiny, setup_main, tmp_path, capsys):
    spec = tiny[name].spec
    folder = tiny[name].place(tmp_path)
    assert run(setup_main, spec, tmp_path) == 0
    archive = next(a for a in spec.archives if label in (*a.labels, a.name))
    (folder / archive.into / label).unlink()
    capsys.readouterr()
    assert run(setup_main, spec, tmp_path, "--verify") == 2
    assert (
        f"{folder / archive.into / label} is missing (from {archive.name}, MD5 {archive.md5})"
        in capsys.readouterr().err
    )
    with pytest.raises(UserError, match=f"{archive.md5}.*dataset_setup_scripts/{name}.py"):
        build(spec, folder, "train")
    assert run(setup_main, spec, tmp_path, "--repair") == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", [b"", b"\x00\xff garbage\n" * 40], ids=["empty", "garbage"])
def test_damaged_label_file(name, damage, tiny, setup_main, tmp_path, capsys):
    spec = tiny[name].spec
    folder = tiny[name].place(tmp_path)
    assert run(setup_main, spec, tmp_path) == 0
    archive = next(a for a in spec.archives if a.labels or a.is_plain)
    (folder / archive.into / (archive.labels or (archive.name,))[0]).write_bytes(damage)
    capsys.readouterr()
    assert run(setup_main, spec, tmp_path) == 2
    assert "--repair" in one_error(capsys)
    with pytest.raises(UserError):
        read_listing(spec, folder)
    assert run(setup_main, spec, tmp_path, "--repair") == 0


def test_verify_counts_images_and_classes(tiny, setup_main, tmp_path, capsys):
    spec = tiny["pets"].spec
    folder = tiny["pets"].place(tmp_path)
    assert run(setup_main, spec, tmp_path) == 0
    (folder / "oxford-iiit-pet/images/Bengal_1.jpg").unlink()
    (folder / "oxford-iiit-pet/images/Bengal_5.jpg").write_bytes(b"")
    test = folder / "oxford-iiit-pet/annotations/test.txt"
    test.write_text("".join(line for line in test.read_text().splitlines(True) if not line.startswith("Abyssinian")))
    capsys.readouterr()
    assert run(setup_main, spec, tmp_path, "--verify") == 2
    report = capsys.readouterr().err
    assert "1 of 12 train images are missing or empty" in report
    assert "1 of 4 test images are missing or empty" in report
    assert "4 test images, expected 6" in report
    assert "1 classes without test images, first 'Abyssinian'" in report
    assert run(setup_main, spec, tmp_path) == 2
    assert run(setup_main, spec, tmp_path, "--repair") == 0
    assert run(setup_main, spec, tmp_path, "--verify") == 0
    assert not (folder / ".unpacking").exists()


def test_an_image_in_train_and_test_is_found(tiny, setup_main, tmp_path, capsys):
    spec = tiny["food101"].spec
    folder = tiny["food101"].place(tmp_path)
    assert run(setup_main, spec, tmp_path) == 0
    meta = folder / "food-101/meta"
    shutil.copy(meta / "test.json", meta / "train.json")
    assert run(setup_main, spec, tmp_path, "--verify") == 2
    assert "6 images are in train and in test" in capsys.readouterr().err


def test_labels_may_not_name_an_image_elsewhere(tiny, setup_main, tmp_path):
    spec = tiny["cub200"].spec
    folder = tiny["cub200"].place(tmp_path)
    assert run(setup_main, spec, tmp_path) == 0
    listed = folder / "CUB_200_2011/images.txt"
    for path in ("/etc/hostname", "../../../other.jpg"):
        listed.write_text(listed.read_text().replace(listed.read_text().splitlines()[0], f"1 {path}"))
        with pytest.raises(UserError, match="outside the data set"):
            build(spec, folder, "train")


def test_a_damaged_image_is_named(tiny, setup_main, tmp_path):
    spec = tiny["aircraft"].spec
    folder = tiny["aircraft"].place(tmp_path)
    assert run(setup_main, spec, tmp_path) == 0
    data = build(spec, folder, "test")
    path = data.source.images.paths[0]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=path.name):
        data[0]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("mnist", "x", "train"), "data.name=mnist is not allowed"),
        (("pets", "x", "dev"), "split=dev is not allowed"),
        (("pets", "x", "train", "mine"), "data.protocol=mine is not allowed"),
        (("pets", "x", "train"), "x/oxford-iiit-pet/images is missing"),
    ],
)
def test_wrong_arguments_of_build(arguments, part):
    with pytest.raises(UserError, match=part):
        build(*arguments)


def test_two_set_ups_at_once(tiny, setup_main, tmp_path, capsys):
    folder = tiny["food101"].place(tmp_path)
    with open(folder / ".setup.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(setup_main, tiny["food101"].spec, tmp_path) == 2
    assert "another set-up" in one_error(capsys)


def test_a_full_disk(tiny, setup_main, tmp_path, capsys, monkeypatch):
    tiny["food101"].place(tmp_path)
    full = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert run(setup_main, tiny["food101"].spec, tmp_path) == 2
    assert "free" in one_error(capsys)


def test_a_folder_that_is_a_file(tiny, setup_main, tmp_path, capsys):
    (tmp_path / "pets").write_text("")
    assert run(setup_main, tiny["pets"].spec, tmp_path) == 2
    assert one_error(capsys).startswith("pets")


def test_a_script_as_a_command(tmp_path):
    command = [sys.executable, str(REPOSITORY / "dataset_setup_scripts/cars.py"), "--root", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "car_devkit.tgz" in done.stderr


def test_labels_beyond_the_classes(tiny, setup_main, tmp_path, capsys):
    """Checksums that fit do not make labels right: a label file for other classes is refused."""
    spec = tiny["cars"].spec
    files = tmp_path / "files"
    shutil.copytree(tiny["cars"].files, files)
    names = mat({"class_names": np.array([["only", "two"]], dtype=object)})
    with tarfile.open(files / "car_devkit.tgz") as tar:
        annos = tar.extractfile("devkit/cars_train_annos.mat").read()
    tar_gz(files / "car_devkit.tgz", {"devkit/cars_train_annos.mat": annos, "devkit/cars_meta.mat": names})
    spec = with_checksums(spec, files)
    shutil.copytree(files, tmp_path / "data/cars")
    assert run(setup_main, spec, Path(tmp_path / "data")) == 2
    assert "labels run from 0 to 2, there are 2 classes" in one_error(capsys)
