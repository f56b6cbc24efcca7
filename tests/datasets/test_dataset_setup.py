"""Every published data set in miniature, from its files to a training step, and what can be wrong with it."""

from __future__ import annotations

import hashlib
import runpy
import sys
import tarfile
from dataclasses import replace

import pytest
import torch
from dataset_helpers import REPOSITORY, one_error, run, snapshot
from PIL import Image
from tiny_archives import MAKERS, with_checksums
from torch import nn
from torchvision.datasets import Flowers102, Food101, OxfordIIITPet
from torchvision.transforms import v2

from razorlab.composition import compose_config
from razorlab.data import build_data
from razorlab.data.published import PUBLISHED, SPLIT_SEED, VAL_FRACTION, build, load
from razorlab.data.published.listing import read_listing
from razorlab.data.splits import stratified_holdout
from razorlab.errors import UserError

NAMES = tuple(MAKERS)
CLASSES = tuple(name for name in NAMES if name not in ("voc", "vader"))  # those with a class per image
OFFERED = tuple(name for name in NAMES if name not in ("cars", "vader"))  # vader: by pip
TENSOR = v2.Compose([v2.Resize((16, 16)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])


@pytest.mark.parametrize("name", CLASSES)
def test_from_archives_placed_by_hand_to_a_training_step(name, tiny, setup_main, tmp_path, capsys):
    spec, root = tiny[name].spec, tmp_path
    folder = tiny[name].place(root)
    assert run(setup_main, spec, root) == 0
    assert run(setup_main, spec, root, "--verify") == 0
    assert f"{spec.train} training and {spec.test} test images in {spec.classes} classes" in capsys.readouterr().out

    before = snapshot(root)
    assert run(setup_main, spec, root) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert snapshot(root) == before

    splits = {part: build(spec, folder, part, val_fraction=0.5) for part in ("train", "val", "test")}
    assert len(splits["train"]) + len(splits["val"]) == spec.train
    assert len(splits["test"]) == spec.test
    for part in splits.values():
        assert len(part.classes) == spec.classes
        assert set(part.targets) == set(range(spec.classes))
    image, label = splits["train"][0]
    assert isinstance(image, Image.Image) and image.mode == "RGB" and label == splits["train"].targets[0]

    data = build(spec, folder, "train", transform=TENSOR, val_fraction=0.5)
    images, labels = next(iter(torch.utils.data.DataLoader(data, batch_size=4)))
    assert images.shape == (4, 3, 16, 16)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, spec.classes)
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    first = nn.functional.cross_entropy(net(images), labels)
    first.backward()
    optimizer.step()
    assert nn.functional.cross_entropy(net(images), labels) < first


@pytest.mark.parametrize("name", OFFERED)
def test_downloads_what_is_not_there(name, tiny, server, setup_main, tmp_path):
    server.files = {path.name: path.read_bytes() for path in tiny[name].files.iterdir()}
    spec = with_checksums(tiny[name].spec, tiny[name].files, server.url)
    assert run(setup_main, spec, tmp_path) == 0
    assert not list(tmp_path.rglob("*.part*"))
    server.seen.clear()
    assert run(setup_main, spec, tmp_path) == 0
    assert server.seen == []


def test_order_and_labels_of_cifar(tiny, setup_main, tmp_path):
    spec = tiny["cifar10"].spec
    folder = tiny["cifar10"].place(tmp_path)
    assert run(setup_main, spec, tmp_path) == 0
    data = build(spec, folder, "test", "official")
    assert list(data.targets) == list(range(9, -1, -1))
    assert all(image.getpixel((31, 0)) == (label,) * 3 for image, label in data)
    assert data.classes[:2] == ("airplane", "automobile")


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_disjoint_and_official_selects_on_test(name, tiny, setup_main, tmp_path):
    spec = tiny[name].spec
    folder = tiny[name].place(tmp_path)
    assert run(setup_main, spec, tmp_path) == 0
    settings = {"name": name, "root": None, "val_fraction": 0.5, "split_seed": 0}
    listing = read_listing(spec, folder)
    train, val = (build(spec, folder, part, val_fraction=0.5).source.images.indices for part in ("train", "val"))
    assert sorted(train + val) == list(range(spec.train))
    official = {part: build(spec, folder, part, "official") for part in ("train", "val", "test")}
    assert official["train"].targets == listing.train.labels
    assert official["val"].targets == official["test"].targets == listing.test.labels
    assert len(official["val"]) == spec.test
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PUBLISHED, name, spec)
        assert load(settings, {"data": str(tmp_path)}).val.images.indices == val


def test_the_split_rule_is_the_committed_one():
    """The same images everywhere: a change of the library's draw would show here, not in a table."""
    labels = [i % 100 for i in range(5_000)]
    kept, val = stratified_holdout(labels, VAL_FRACTION, SPLIT_SEED, "data.val_fraction")
    assert [sum(labels[i] == label for i in val) for label in range(100)] == [5] * 100
    assert not set(kept) & set(val)
    assert hashlib.sha256(str(val).encode()).hexdigest()[:16] == "3596188dcd7697e9"


def test_an_interrupted_download_goes_on(tiny, server, setup_main, tmp_path, capsys):
    server.files = {path.name: path.read_bytes() for path in tiny["pets"].files.iterdir()}
    spec = with_checksums(tiny["pets"].spec, tiny["pets"].files, server.url)
    server.cut_after = 100
    assert run(setup_main, spec, tmp_path) == 2
    line = one_error(capsys)
    assert "500 bytes are kept" in line and "run the command again" in line  # five attempts, each a bit further
    server.cut_after = None
    assert run(setup_main, spec, tmp_path) == 0
    assert ("/images.tar.gz", "bytes=500-") in server.seen


def test_an_interrupted_set_up_goes_on_with_what_is_missing(tiny, setup_main, tmp_path, capsys):
    spec = tiny["pets"].spec
    folder = tiny["pets"].place(tmp_path)
    annotations = folder / "annotations.tar.gz"
    annotations.rename(tmp_path / "later")
    offline = replace(spec, archives=tuple(replace(a, url=None) for a in spec.archives))
    images_only = replace(offline, archives=offline.archives[:1], read=lambda root: 1 / 0)
    assert run(setup_main, images_only, tmp_path) == 2  # unpacks the first archive, then finds no labels
    (folder / ".unpacking/images").mkdir(parents=True)  # what a killed set-up leaves
    (folder / ".unpacking/images/half.jpg").write_bytes(b"half")
    done = snapshot(folder / "oxford-iiit-pet/images")
    (tmp_path / "later").rename(annotations)
    capsys.readouterr()
    assert run(setup_main, offline, tmp_path) == 0
    assert "unpacking" in capsys.readouterr().out
    assert snapshot(folder / "oxford-iiit-pet/images") == done
    assert not (folder / ".unpacking").exists()


def test_a_tree_that_was_unpacked_elsewhere_is_accepted(tiny, setup_main, tmp_path, capsys):
    spec = tiny["cub200"].spec
    folder = tiny["cub200"].place(tmp_path)
    with tarfile.open(folder / "CUB_200_2011.tgz") as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2 has none
        tar.extractall(folder)
    (folder / "CUB_200_2011.tgz").unlink()
    assert run(setup_main, spec, tmp_path) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("name", [*NAMES, "all"])
def test_each_script_sets_up_its_data_set(name, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(REPOSITORY / "dataset_setup_scripts"))
    monkeypatch.setattr(sys, "argv", [name, "--verify", "--root", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPOSITORY / f"dataset_setup_scripts/{name}.py"), run_name="__main__")
    assert end.value.code == 2
    report = capsys.readouterr().err
    for spec in PUBLISHED.values():
        assert (f"{spec.name}: {spec.archives[0].made(tmp_path / spec.name)} is missing" in report) == (
            name in (spec.name, "all")
        )


def test_checksums_are_the_published_ones():
    """torchvision publishes them for the sets that it downloads."""
    ours = {archive.name: archive.md5 for spec in PUBLISHED.values() for archive in spec.archives}
    theirs = dict(Flowers102._file_dict.values())
    theirs |= {url.rpartition("/")[2]: md5 for url, md5 in OxfordIIITPet._RESOURCES}
    theirs["food-101.tar.gz"] = Food101._MD5
    assert {name: ours[name] for name in theirs} == theirs


def test_an_interrupt_says_how_to_go_on(tiny, setup_main, tmp_path, capsys):
    def interrupt(root):
        raise KeyboardInterrupt

    tiny["pets"].place(tmp_path)
    assert run(setup_main, replace(tiny["pets"].spec, read=interrupt), tmp_path) == 130
    assert f"dataset_setup_scripts/pets.py --root {tmp_path}` to go on" in one_error(capsys)


@pytest.mark.parametrize("name", CLASSES)
def test_the_configuration_that_ships_loads_the_data_set(name, tiny, setup_main, tmp_path, monkeypatch):
    """configs/data/<name>.yaml through the laboratory's own loader, at both protocols."""
    spec = tiny[name].spec
    tiny[name].place(tmp_path)
    assert run(setup_main, spec, tmp_path) == 0
    monkeypatch.setitem(PUBLISHED, name, spec)
    settings = compose_config([f"data={name}"])["data"]
    assert (settings["val_fraction"], settings["split_seed"]) == (VAL_FRACTION, SPLIT_SEED)
    settings |= {"image_size": 32, "val_fraction": 0.5}
    bundle = build_data(settings, {"data": str(tmp_path)})
    assert len(bundle.train) + len(bundle.val) == spec.train and len(bundle.test) == spec.test
    assert len(bundle.class_names) == spec.classes
    image, label = bundle.train[0]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8 and label == bundle.train.labels[0]
    official = build_data(settings | {"protocol": "official"}, {"data": str(tmp_path)})
    assert len(official.train) == spec.train and len(official.val) == spec.test


def test_validation_images_can_be_named_in_a_file(tiny, setup_main, tmp_path, monkeypatch):
    spec = tiny["pets"].spec
    tiny["pets"].place(tmp_path)
    assert run(setup_main, spec, tmp_path) == 0
    monkeypatch.setitem(PUBLISHED, "pets", spec)
    train = read_listing(spec, tmp_path / "pets").train
    first = [train.labels.index(label) for label in range(spec.classes)]
    names = [train.images.paths[index].name for index in first]
    file = tmp_path / "val.txt"
    file.write_text("".join(f"train/{label}/{name} {label}\n" for label, name in enumerate(names)))
    settings = compose_config(["data=pets"])["data"]
    settings |= {"image_size": 32, "val_file": str(file), "protocol": "official", "official_test": "val"}
    bundle = build_data(settings, {"data": str(tmp_path)})
    held = bundle.test.source.images
    assert [held.source.paths[index].name for index in held.indices] == names
    assert len(bundle.train) == spec.train - spec.classes and str(file) in bundle.note
    for text, word in (("nobody.jpg", "nobody.jpg"), ("", "names 0 images"), (f"{names[0]}\n" * 2, "names 2 images")):
        file.write_text(text)
        with pytest.raises(UserError, match=word):
            build_data(settings, {"data": str(tmp_path)})
    with pytest.raises(UserError, match="cannot be read"):
        build_data(settings | {"val_file": str(tmp_path)}, {"data": str(tmp_path)})


def test_the_vit_recipe_of_pets_holds_740_images_out():
    """As many as the released split file: a stratified share of 3,680 images in 37 classes."""
    settings = compose_config(["experiment=table2/pets_paper90"])["data"]
    labels = [label for label in range(37) for _ in range(100 if label < 17 else 99)]
    kept, out = stratified_holdout(labels, settings["val_fraction"], 0, "data.val_fraction")
    assert (len(kept), len(out), settings["official_test"]) == (2940, 740, "val")


def test_the_documented_table_is_the_one_in_use():
    text = (REPOSITORY / "docs/datasets.md").read_text()
    for spec in PUBLISHED.values():
        row = next(line for line in text.splitlines() if line.startswith(f"| {spec.name} |"))
        assert f"| {spec.classes} | {spec.train:,} / {spec.test:,} |" in row
        assert all(f"`{archive.name}` {archive.md5}" in row for archive in spec.archives)
