"""The embedded digits, any image folder, image modes, transforms."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import compose_plain, write_image, write_tree
from PIL import Image

from transfer.data import build_data
from transfer.data.images import read_image, to_rgb
from transfer.data.splits import stratified_holdout
from transfer.errors import UserError

# Pixels and labels in order: a library that drew another split from the same seed would change it.
DIGITS_SPLIT = "74f05e14348f04e6"


def digits(*overrides: str):
    config = compose_plain(*overrides)
    return build_data(config["data"], config["paths"])


def folder(root: Path, *overrides: str):
    config = compose_plain("data=folder", f"data.root={root}", "data.image_size=32", *overrides)
    return build_data(config["data"], config["paths"])


def paths(part) -> list[Path]:
    selected = part.source.images
    return [selected.source.paths[i] for i in selected.indices]


def test_digits_splits_are_disjoint_stratified_and_the_committed_ones() -> None:
    data = digits()
    sizes = [len(part) for part in (data.train, data.val, data.test)]
    assert sizes == [898, 180, 719] and sum(sizes) == 1797
    for part, size in zip((data.train, data.val, data.test), sizes, strict=True):
        counts = torch.bincount(part.labels, minlength=10).float()
        assert (counts / size - 0.1).abs().max() < 0.01, "about a tenth of each class"
    pixels = [part.source.images[i].tobytes() for part in (data.train, data.val, data.test) for i in range(len(part))]
    assert len(set(pixels)) == 1797, "every image is in one split only"
    labels = bytes(label for part in (data.train, data.val, data.test) for label in part.source.labels)
    assert hashlib.sha256(b"".join(pixels) + labels).hexdigest()[:16] == DIGITS_SPLIT


def test_digits_are_upsampled_cached_and_made_scarcer_by_the_settings() -> None:
    data = digits("data.image_size=48", "data.train_fraction=0.2")
    image, label = data.train[0]
    assert image.shape == (3, 48, 48) and image.dtype == torch.uint8 and 0 <= label < 10
    assert data.train[0][0] is image, "the second read comes from the cache"
    assert len(data.train) == 180 and len(data.test) == 719, "a smaller training split leaves the test split alone"
    full = digits()
    source = {full.train.source.images[i].tobytes() for i in range(len(full.train))}
    assert all(data.train.source.images[i].tobytes() in source for i in range(len(data.train)))


def test_official_protocol_selects_on_test_and_says_so() -> None:
    data = digits("data.protocol=official")
    assert len(data.train) == 898 + 180 and len(data.val) == len(data.test) == 719
    assert "selected on test" in data.note


def test_one_tree_is_split_reproducibly_whatever_the_order_on_disk(tmp_path: Path) -> None:
    write_tree(tmp_path / "a", classes=3, images=12)
    for label in reversed(range(3)):  # the same files, written in another order
        for index in reversed(range(12)):
            write_image(tmp_path / "b" / f"class{label}" / f"{index}.png", seed=label * 12 + index)
    (tmp_path / "a" / "class0" / "notes.txt").write_text("no image")
    (tmp_path / "a" / ".hidden").mkdir()
    names = []
    for root in (tmp_path / "a", tmp_path / "b"):
        data = folder(root)
        parts = [
            {path.relative_to(root).as_posix() for path in paths(part)} for part in (data.train, data.val, data.test)
        ]
        assert len(set.union(*parts)) == 36 == sum(map(len, parts))
        names.append(parts)
    assert names[0] == names[1]
    assert data.class_names == ("class0", "class1", "class2")


def test_sub_folders_are_used_as_found_and_validation_is_drawn_from_train(tmp_path: Path) -> None:
    for part, images in (("train", 10), ("test", 4)):
        write_tree(tmp_path / part, images=images)
    data = folder(tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 8)
    write_tree(tmp_path / "val", images=3)
    data = folder(tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (20, 6, 8)


def test_val_without_test_is_the_test_split(tmp_path: Path) -> None:
    write_tree(tmp_path / "train")
    write_tree(tmp_path / "val", images=3)
    data = folder(tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 6) and "test is val/" in data.note


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_every_png_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.png"
    if mode == "I;16":
        Image.fromarray(np.full((16, 16), 32768, dtype=np.uint16)).save(path)
    else:
        write_image(path, mode)
    image = read_image(path)
    assert image.mode == "RGB" and image.size == (16, 16)
    if mode == "I;16":
        assert image.getpixel((0, 0)) == (128, 128, 128)


def test_transparency_is_laid_over_white() -> None:
    assert to_rgb(Image.new("RGBA", (8, 8), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 0)
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_damaged_small_and_missing_images_are_named(tmp_path: Path) -> None:
    whole = write_image(tmp_path / "whole.png", side=64)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:500])
    (tmp_path / "text.png").write_text("hello")
    for name in ("cut.png", "text.png", "absent.png"):
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name)
    with pytest.raises(UserError, match="4x4 pixels"):
        read_image(write_image(tmp_path / "tiny.png", side=4))


@pytest.mark.parametrize("kind", ["plain", "random_crop", "resize_crop"])
def test_transforms_end_at_the_input_size_in_uint8(tmp_path: Path, kind: str) -> None:
    root = write_tree(tmp_path, images=10)
    data = folder(
        root, f"data.train_transform={kind}", "data.flip=true", "data.color_jitter=0.4", "data.hue_jitter=0.1"
    )
    for part in (data.train, data.val, data.test):
        image, _ = part[0]
        assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    assert torch.equal(data.test[0][0], data.test[0][0]), "evaluation draws nothing"


def test_holdout_needs_every_class_on_both_sides() -> None:
    kept, out = stratified_holdout([0] * 6 + [1] * 6, 0.5, 0, "share")
    assert sorted(kept + out) == list(range(12)) and len(out) == 6
    for labels in ([0] * 9 + [1], [0, 0, 1, 1, 2, 2]):
        with pytest.raises(UserError, match=r"share=0\.3"):
            stratified_holdout(labels, 0.3, 0, "share")
