"""The embedded digits, any image folder, image modes, transforms."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import compose_plain, write_image, write_tree
from PIL import Image
from torchvision.transforms import v2

from razorlab.data import build_data
from razorlab.data.images import read_image, to_rgb
from razorlab.data.splits import stratified_holdout
from razorlab.data.transforms import eval_transform, train_transform
from razorlab.errors import UserError

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


def test_official_protocol_trains_on_all_and_selects_nothing() -> None:
    data = digits("data.protocol=official")
    assert len(data.train) == 898 + 180 and len(data.val) == len(data.test) == 719
    assert "nothing is selected" in data.note and "every other image trains" in data.note
    data = digits("data.protocol=official", "data.official_test=val")
    assert len(data.train) == 898 and len(data.val) == len(data.test) == 180
    assert "test is not used" in data.note


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


def test_links_to_folders_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    elsewhere = write_tree(tmp_path / "elsewhere", classes=2)
    root = tmp_path / "tree"
    (root / "linked").mkdir(parents=True)
    (root / "linked" / "photos").symlink_to(elsewhere / "class0", target_is_directory=True)
    write_classes(root, mixed=5)
    (root / "mixed" / "more").symlink_to(elsewhere / "class1", target_is_directory=True)
    (root / "mixed" / "again").symlink_to(elsewhere / "class1", target_is_directory=True)
    (root / "mixed" / "self").symlink_to(root / "mixed", target_is_directory=True)
    (root / "mixed" / "up").symlink_to(root, target_is_directory=True)
    (elsewhere / "class1" / "back").symlink_to(elsewhere / "class1", target_is_directory=True)
    data = folder(root)
    found = [path for part in (data.train, data.val, data.test) for path in paths(part)]
    names = sorted(path.relative_to(root).as_posix() for path in found)
    expected = (
        [f"mixed/{i}.png" for i in range(5)]
        + [f"linked/photos/{i}.png" for i in range(10)]
        + [f"mixed/again/{i}.png" for i in range(10)]
    )
    assert names == sorted(expected), "each image once, none of another class"


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    root = write_tree(tmp_path)
    (root / "class0" / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"locked cannot be read \(Permission denied\)"):
        folder(root)


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
    with pytest.raises(UserError, match="cannot be read") as caught:
        read_image(tmp_path / "cut.png")
    assert str(type(caught.value)("a data worker's text")) == "a data worker's text", "torch makes it again so"
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


def levels_apart(ours: torch.Tensor, theirs: Image.Image) -> float:
    """Mean difference of two images in levels of 255."""
    return (ours.float() - torch.from_numpy(np.array(theirs)).permute(2, 0, 1).float()).abs().mean().item()


def test_evaluation_squashes_or_crops_as_the_released_code_does() -> None:
    """The reference is Pillow's own resize, which that code applies before it makes tensors. Some images are wide."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((300, 200), Image.Resampling.BICUBIC)
    middle = (round(15.5), round(15.5), 240, 240)  # as it places the crop in 256 pixels
    wanted = {
        "experiment=table2/cifar100_paper90": image.resize((224, 224), Image.Resampling.BILINEAR),
        "experiment=table2/pets_paper90": image.resize((256, 256)).crop(middle),
        "experiment=table1/pets_full": image.resize((384, 256), Image.Resampling.BILINEAR).crop((80, 16, 304, 240)),
        "data=digits data.image_size=224": image.resize((224, 224), Image.Resampling.BICUBIC),
    }
    got = {name: eval_transform(compose_plain(*name.split())["data"]).fixed(image) for name in wanted}
    for name, tensor in got.items():
        apart = {other: levels_apart(tensor, reference) for other, reference in wanted.items()}
        assert min(apart, key=apart.__getitem__) == name and apart[name] < 0.5, (name, apart)


def test_the_co_tuning_transform_squashes_before_it_crops() -> None:
    """A crop of the whole area is the squashed image itself; the plain random crop is bilinear."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 30, 3), dtype=np.uint8))
    whole = {"image_size": 32, "crop_scale_min": 1.0, "flip": False, "color_jitter": 0.0, "hue_jitter": 0.0}
    data = whole | {"train_transform": "resize_crop", "interpolation": "bilinear"}
    transform = train_transform(data)
    assert levels_apart(transform.fixed(image), image.resize((37, 37))) < 1
    assert transform.random(transform.fixed(image)).shape == (3, 32, 32)
    for name in ("cifar100_paper90", "pets_paper90", "aircraft_compact80"):
        data = compose_plain(f"experiment=table2/{name}")["data"]
        crop = train_transform(data).random.transforms[0]
        assert crop.interpolation == v2.InterpolationMode.BILINEAR
        assert tuple(crop.scale) == ((0.05 if name.startswith("cifar") else 0.08), 1.0)


def write_classes(root: Path, **images: int) -> Path:
    """Write ``root/<class>/<n>.png`` for each ``class=count``."""
    for label, (name, count) in enumerate(images.items()):
        for index in range(count):
            write_image(root / name / f"{index}.png", seed=1000 * label + index)
    return root


REFUSED = [
    (
        {"many": 400, "pair": 2},
        (),
        [
            "data.val_fraction=0.1",
            "class 'pair'",
            "without validation images",
            "2 for training",
            "about 10 images",
        ],
    ),
    (
        {"many": 61, "more": 61, "pair": 2, "two": 2},
        (),
        [
            "data.val_fraction=0.1",
            "class 'pair' (and 1 more class)",
            "0 for test",
            "test/ yourself",
        ],
    ),
    (
        {"many": 200, "more": 200, "pair": 2},
        ("data.test_fraction=0.8",),
        [
            "data.test_fraction=0.8",
            "class 'pair'",
            "without training images",
            "2 for test",
            "about 10 images",
        ],
    ),
    (
        {"many": 200, "four": 4},
        ("data.test_fraction=0.8",),
        ["data.val_fraction=0.1", "that the test split leaves", "smallest class: 'four' with 1"],
    ),
    (
        {"many": 40, "four": 4},
        ("data.val_fraction=0.05",),
        ["data.val_fraction=0.05", "class 'four'", "without validation images", "about 20 images"],
    ),
    (
        {"many": 40, "other": 40, "ten": 10},
        ("data.train_fraction=0.05",),
        ["data.train_fraction=0.05", "class 'ten'", "without training images", "about 29 images"],
    ),
]


@pytest.mark.parametrize(("images", "overrides", "words"), REFUSED)
def test_a_class_without_images_in_a_drawn_split_is_named(
    tmp_path: Path, images: dict[str, int], overrides: tuple[str, ...], words: list[str]
) -> None:
    root = write_classes(tmp_path, **images)
    with pytest.raises(UserError) as caught:
        folder(root, *overrides)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_as_many_images_as_the_refusal_asks_for_are_enough(tmp_path: Path) -> None:
    root = write_classes(tmp_path, many=40, other=40, ten=10)
    data = folder(root)
    for part in (data.train, data.val, data.test):
        assert torch.bincount(part.labels, minlength=3).min() >= 1


def test_under_the_official_protocol_no_class_needs_validation_images(tmp_path: Path) -> None:
    root = write_classes(tmp_path, many=40, four=4)
    with pytest.raises(UserError, match="without validation images"):
        folder(root, "data.val_fraction=0.05")
    data = folder(root, "data.val_fraction=0.05", "data.protocol=official")
    assert torch.bincount(data.val.labels).tolist() == torch.bincount(data.test.labels).tolist() == [1, 8]


def test_a_test_folder_may_lack_a_class_and_the_log_says_so(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", many=20, other=20)
    write_classes(tmp_path / "test", many=5)
    data = folder(tmp_path)
    assert len(data.test) == 5 and "no test images of class 'other'" in data.note
    (tmp_path / "train" / "tiny").mkdir()
    for index in range(2):
        write_image(tmp_path / "train" / "tiny" / f"{index}.png", seed=index)
    with pytest.raises(UserError, match="class 'tiny' without validation images"):
        folder(tmp_path)


def test_an_unbalanced_digits_split_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.utils import Bunch

    from razorlab.data import digits as embedded

    whole = embedded.load_digits()
    kept = np.concatenate([np.flatnonzero(whole.target != 7), np.flatnonzero(whole.target == 7)[:2]])
    part = Bunch(images=whole.images[kept], target=whole.target[kept], target_names=whole.target_names)
    monkeypatch.setattr(embedded, "load_digits", lambda: part)
    with pytest.raises(UserError, match=r"data\.val_fraction=0\.1 .*class '7'.*\(2 for training, 0 for"):
        digits("data.test_fraction=0.1")


def test_the_value_that_was_set_is_the_one_that_is_named(tmp_path: Path) -> None:
    root = write_classes(tmp_path, **{f"class{label}": 4 for label in range(5)})
    with pytest.raises(UserError, match=r"data\.val_fraction=0\.1 cannot be drawn from .*\(smallest class: 'class"):
        folder(root, "data.test_fraction=0.25")


def test_holdout_needs_every_class_on_both_sides() -> None:
    kept, out = stratified_holdout([0] * 6 + [1] * 6, 0.5, 0, "share")
    assert sorted(kept + out) == list(range(12)) and len(out) == 6
    for labels in ([0] * 9 + [1], [0, 0, 1, 1, 2, 2]):
        with pytest.raises(UserError, match=r"share=0\.3"):
            stratified_holdout(labels, 0.3, 0, "share")
