"""Every wrong input ends in one line that names it, exit code 2, and nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY, files_below, write_image, write_tree

FOLDER = (*TINY, "data=folder", "data.root=tree", "data.val_fraction=0.2", "data.test_fraction=0.2")


def class_in_test_only(root: Path) -> None:
    write_tree(root / "train")
    write_tree(root / "test", classes=3)


def corrupt_image(root: Path) -> None:
    write_tree(root)
    (root / "class1" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")


def truncated_image(root: Path) -> None:
    write_tree(root)
    whole = write_image(root / "class1" / "3.png", side=64).read_bytes()
    (root / "class1" / "3.png").write_bytes(whole[: len(whole) // 2])


def small_image(root: Path) -> None:
    write_tree(root)
    write_image(root / "class0" / "0.png", side=3)


def empty_class(root: Path) -> None:
    write_tree(root)
    (root / "class9").mkdir()


def many_bad(root: Path) -> None:
    write_tree(root)
    write_image(root / "class0" / "0.png", side=3)
    for index in range(3, 9):
        (root / "class1" / f"{index}.png").write_bytes(b"broken")


def bad_in_both_parts(root: Path) -> None:
    for part, images in (("train", 4), ("test", 2)):
        write_tree(root / part, images=images)
    (root / "train" / "class1" / "0.png").write_bytes(b"broken")
    (root / "test" / "class0" / "1.png").write_bytes(b"broken")


def link_to_nothing(root: Path) -> None:
    write_tree(root)
    (root / "class0" / "gone.png").symlink_to(root / "nowhere.png")


def train_without_test(root: Path) -> None:
    write_tree(root / "train")


def too_few(root: Path) -> None:
    write_tree(root, images=1)


def garbage_weights(root: Path) -> None:
    root.mkdir()
    (root / "weights.pth").write_bytes(b"no weights")


# arguments, words that the line must hold, what to build at ./tree first
CASES: list[tuple[tuple[str, ...], tuple[str, ...], Callable[[Path], object] | None]] = [
    (("model=nosuch",), ("model=nosuch", "efficientnet_lite0|", "vit_b16"), None),
    (("model=timm", "model.name=resnet19"), ("model.name=resnet19", "did you mean"), None),
    (("model=timm",), ("model.name must be given",), None),
    (
        (*TINY, "model.name=test_vit.r160_in1k", "trainer.measure.image_size=64"),
        ("trainer.measure.image_size=64 is not possible", "data.image_size=64"),
        None,
    ),
    (
        (*TINY, "model.name=crossvit_tiny_240", "data.image_size=224"),
        ("model.name=crossvit_tiny_240 fails on images of 224 px", "made for 240 px, set data.image_size=240"),
        None,
    ),
    (
        (*TINY, "model.name=halonet26t", "data.image_size=224"),
        ("model.name=halonet26t fails", "(AssertionError)", "made for 256 px, set data.image_size=256"),
        None,
    ),
    (
        (*TINY, "model.name=halonet26t", "data.image_size=256", "trainer.measure={mode: all, image_size: 224}"),
        ("fails on images of 224 px", "made for 256 px"),
        None,
    ),
    (
        ("model=resnet18", "razor=none"),
        ("resnet18-f37072fd.pth", "pretrain/fetch.py resnet18", "model.pretrained=false"),
        None,
    ),
    (("model=vit_b16", "razor=none"), ("ViT-B_16.npz", "https://", "model.pretrained=false"), None),
    ((*TINY, "model.pretrained=true", "model.weights=nofile.pth"), ("model.weights=nofile.pth",), None),
    (
        (*TINY, "model.pretrained=true", "model.weights=tree/weights.pth"),
        ("weights.pth", "cannot be read"),
        garbage_weights,
    ),
    (("data=nosuch",), ("data=nosuch", "digits", "folder"), None),
    (("data.name=nosuch", "razor=none"), ("data.name=nosuch", "digits"), None),
    (("razor=nosuch",), ("razor=nosuch", "compact|int8|none|paper"), None),
    (("method=nosuch",), ("method=nosuch", "full|last"), None),
    (("experiment=nosuch",), ("experiment=nosuch", "demo/ (", "--list experiment"), None),
    (("experiment=table2/cifar100_compact91",), ("did you mean table2/cifar100_compact90",), None),
    (("razor.sparsity=1.0",), ("razor.sparsity=1.0", "[0, 1)"), None),
    (("razor.sparsity=-0.1",), ("razor.sparsity=-0.1", "[0, 1)"), None),
    (("razor.sparsity=much",), ("razor.sparsity=much", "[0, 1)"), None),
    (("razor.sparsity=nan",), ("razor.sparsity=nan", "[0, 1)"), None),
    (("razor.sparsity=null",), ("razor.sparsity=null", "[0, 1)"), None),
    (("razor.sparsity=true",), ("razor.sparsity=True", "[0, 1)"), None),
    (("razor=none", "razor.sparsity=0.9"), ("razor=none", "razor.sparsity=0.9", "razor=compact"), None),
    (("razor=int8", "razor.sparsity=0.9"), ("razor=int8", "razor.sparsity=0.9"), None),
    (("razor=none", "razor.values=int8"), ("razor=none", "razor.values=int8"), None),
    (("razor.values=int3",), ("razor.values=int3", "bfloat16"), None),
    (("method=norm_last", "method.bn_affine=frozen"), ("method=norm_last", "method=last"), None),
    (("data.image_size=16",), ("data.image_size=16", "[32, 1024]"), None),
    (("data.image_size=64.5",), ("data.image_size=64.5", "whole number"), None),
    (("trainer.batch_size=0",), ("trainer.batch_size=0", "[1, 1e+06]"), None),
    (("trainer.micro_batch=64",), ("trainer.micro_batch=64", "trainer.batch_size=16"), None),
    (("trainer.checkpointing=layer",), ("trainer.checkpointing=layer", "none|block|stage|selective"), None),
    (
        ("razor=compact", "trainer.checkpointing=selective"),
        ("razor=compact", "trainer.checkpointing=selective", "trainer.checkpointing=block"),
        None,
    ),
    (("optim.lr=0",), ("optim.lr=0", "(0, 1e+38]"), None),
    (("optim.foo=1",), ("optim.foo", "--help"), None),
    (("+optim.foo=1",), ("optim.foo", "--help"), None),
    (("nonsense",), ("nonsense",), None),
    (("--nonsense",), ("--nonsense", "--help"), None),
    (("data.val_fraction=0.4", "data.test_fraction=0.7"), ("data.test_fraction=0.7",), None),
    (("data=folder",), ("data.root must be given",), None),
    (FOLDER, ("data.root=tree", "not a folder"), None),
    (FOLDER, ("0 class folders",), Path.mkdir),
    (FOLDER, ("class2", "not in train/"), class_in_test_only),
    (FOLDER, ("3.png", "cannot be read"), corrupt_image),
    (FOLDER, ("3.png", "cannot be read"), truncated_image),
    (FOLDER, ("0.png", "3x3 pixels"), small_image),
    (FOLDER, ("class9", "no images"), empty_class),
    (FOLDER, ("7 of 20 files cannot be used", "class0/0.png is too small", "3.png cannot be", "2 more;"), many_bad),
    (FOLDER, ("2 of 12 files", "train/class1/0.png", "test/class0/1.png"), bad_in_both_parts),
    (FOLDER, ("gone.png cannot be read as an image", "No such file"), link_to_nothing),
    (FOLDER, ("train/", "no test/"), train_without_test),
    (FOLDER, ("data.test_fraction=0.2", "smallest class: 'class0' with 1"), too_few),
    (
        (*TINY, "paths.outputs=tree/0.png"),
        ("paths.outputs=tree/0.png", "cannot be written"),
        lambda root: write_image(root / "0.png"),
    ),
]


@pytest.mark.parametrize(("arguments", "words", "prepare"), CASES, ids=lambda case: None)
def test_one_line_exit_code_two_nothing_written(command, tmp_path: Path, arguments, words, prepare) -> None:
    if prepare is not None:
        prepare(tmp_path / "tree")
    before = files_below(tmp_path)
    code, lines = command(*arguments)
    assert code == 2
    assert len(lines) == 1 and lines[0].startswith("train.py: "), lines
    for word in words:
        assert word in lines[0]
    assert files_below(tmp_path) == before and not (tmp_path / "outputs").exists()


def test_a_wrong_value_in_a_sweep_is_named_and_the_code_is_two(command, tmp_path: Path) -> None:
    code, lines = command("-m", "razor.sparsity=0.9,2", *[text for text in TINY if text != "razor=none"], "seed=-1")
    assert code == 2 and all(line.startswith("train.py: ") for line in lines), lines


def test_full_error_shows_the_traceback(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    code, lines = command("razor.sparsity=2")
    assert code == 2 and any("Traceback" in line for line in lines)


def test_an_image_that_vanishes_during_the_run_is_named(command, tmp_path: Path, monkeypatch) -> None:
    write_tree(tmp_path / "tree")
    from razorlab.training import run

    checked = run.assemble

    def assemble_then_lose_the_data(*arguments):
        network = checked(*arguments)
        shutil.rmtree(tmp_path / "tree" / "class0")
        return network

    monkeypatch.setattr(run, "assemble", assemble_then_lose_the_data)
    code, lines = command(*FOLDER)
    assert code == 2 and "class0" in lines[-1] and "cannot be read" in lines[-1]
    assert not list((tmp_path / "outputs").rglob("record.json"))
