"""Input that means harm: one line, exit code 2, nothing executed, and nothing written outside the run's folder.

Everything goes through the command line, in this process. Archives and CIFAR's pickles: tests/datasets.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import hostile_files as make
import numpy as np
import pytest
import torch
from conftest import TINY, compose_plain, files_below, write_tree

from razorlab import __main__ as razorlab
from razorlab.records import config_hash, run_directory

VIT = ("model=timm", "model.name=test_vit", *TINY[3:], "data.image_size=160", "model.weights=tree/w.npz")
WEIGHTS = (*TINY, "model.pretrained=true")
FOLDER = (*TINY, "data=folder", "data.root=tree", "data.val_fraction=0.2", "data.test_fraction=0.2")
PTH, SAFE = "model.weights=tree/w.pth", "model.weights=tree/w.safetensors"
BAD_WEIGHTS = "cannot be read as weights"
NO_IMAGE = ("evil.png", "cannot be read as an image")

# name: (arguments, words that the line must hold, what to build at ./tree first)
Case = tuple[tuple[str, ...], tuple[str, ...], Callable[[Path], object] | None]
VALUES: dict[str, Case] = {
    text: ((text,), words, None)
    for text, *words in (
        ("seed=99999999999999999999", "seed="),
        ("seed=-1", "seed=-1"),
        ("seed=1.5", "seed=1.5", "whole number"),
        ("seed=[1,2]", "seed="),
        ("seed={a:1}", "seed"),
        ("~seed", "seed"),
        ("trainer.epochs=1e30", "trainer.epochs=1e+30"),
        ("trainer.epochs=100000000", "trainer.epochs=100000000"),
        ("trainer.steps=0", "trainer.steps=0"),
        ("trainer.batch_size=1000000000000", "trainer.batch_size=1000000000000"),
        ("trainer.eval_batch_size=1000000000000", "trainer.eval_batch_size=1000000000000"),
        ("trainer.measure.batch_size=1000000000", "trainer.measure.batch_size=1000000000"),
        ("trainer.workers=100000", "trainer.workers=100000"),
        ("trainer.threads=0", "trainer.threads=0"),
        ("trainer.measure.repeats=1000000", "trainer.measure.repeats=1000000"),
        ("data.image_size=100000", "data.image_size=100000"),
        ("data.crop_scale_min=nan", "data.crop_scale_min=nan"),
        ("data.train_fraction=-0.5", "data.train_fraction=-0.5"),
        ("optim.lr=nan", "optim.lr=nan"),
        ("optim.lr=inf", "optim.lr=inf"),
        ("optim.lr=1e400", "optim.lr=inf"),
        ("optim.lr=1e300", "optim.lr=1e+300"),
        ("optim.lr=-0.1", "optim.lr=-0.1"),
        ("optim.weight_decay=-1", "optim.weight_decay=-1"),
        ("optim.label_smoothing=1", "optim.label_smoothing=1"),
        ("optim.grad_clip=nan", "optim.grad_clip=nan"),
        ("razor.sparsity=1e9", "razor.sparsity=1000000000.0"),
        ("razor.sparsity=[0.9]", "razor.sparsity="),
        ("razor.name=[compact,paper]", "razor.name="),
        ("razor=", "razor="),
        ("~razor", "razor"),
        ("trainer=null", "trainer=null", "trainer.epochs=..."),
        ("model.name=", "model.name"),
        ("model.name=../../etc/passwd", "model.name=../../etc/passwd"),
        ("model.name=hf_hub:someone/evil", "model.name=hf_hub:someone/evil"),
        ("model=../data/digits", "model"),
        ("experiment=../../../etc/passwd", "experiment"),
        ("experiment=/etc/passwd", "experiment"),
        ("data.name=/etc", "data.name=/etc"),
        ("paths.outputs=${paths.outputs}", "paths.outputs"),
        ("paths.outputs=${nosuch:1}", "nosuch"),
        ("paths.outputs=${paths", "mismatched input"),
        ("paths.outputs=/proc/nosuch", "paths.outputs=/proc/nosuch", "cannot be written"),
        ("paths.outputs=/dev/null/runs", "paths.outputs=/dev/null/runs", "cannot be written"),
        ("+razor._target_=os.system", "razor._target_"),
        ("hydra.run.dir=../elsewhere", "hydra.run.dir"),
        ("hydra.output_subdir=.hydra", "hydra.output_subdir"),
        ("+hydra.callbacks.evil._target_=os.system", "hydra.callbacks.evil._target_"),
        ("hydra/job_logging=default", "hydra/job_logging"),
        ("--experimental-rerun=tree/job.pickle", "--experimental-rerun"),
        ("--config-dir=tree", "--config-dir"),
    )
}
WEIGHT_FILES: dict[str, Case] = {
    "pickle that runs a command": ((*WEIGHTS, PTH), (BAD_WEIGHTS,), make.weights("w.pth", make.pickled())),
    "the same in torch's format": ((*WEIGHTS, PTH), (BAD_WEIGHTS,), make.weights("w.pth", make.torch_pickled())),
    "torch file cut in half": (
        (*WEIGHTS, PTH),
        (BAD_WEIGHTS,),
        make.weights("w.pth", make.torch_file({"a": torch.zeros(100)})[:400]),
    ),
    "empty file": ((*WEIGHTS, PTH), (BAD_WEIGHTS,), make.weights("w.pth", b"")),
    "a list": ((*WEIGHTS, PTH), ("holds no state dict",), make.weights("w.pth", make.torch_file([1, 2]))),
    "no tensors": ((*WEIGHTS, PTH), ("holds no state dict",), make.weights("w.pth", make.torch_file({"a": 1}))),
    "no names": ((*WEIGHTS, PTH), ("holds no state dict",), make.weights("w.pth", make.torch_file({1: torch.ones(1)}))),
    "nothing in it": ((*WEIGHTS, PTH), ("does not fit",), make.weights("w.pth", make.torch_file({}))),
    "another network": (
        (*WEIGHTS, PTH),
        ("does not fit",),
        make.weights("w.pth", make.torch_file({"conv.weight": torch.ones(3)})),
    ),
    "a folder": ((*WEIGHTS, "model.weights=tree"), ("model.weights=tree is not a file",), Path.mkdir),
    "a device": ((*WEIGHTS, "model.weights=/dev/zero"), ("model.weights=/dev/zero is not a file",), None),
    "safetensors of garbage": ((*WEIGHTS, SAFE), (BAD_WEIGHTS,), make.weights("w.safetensors", b"\xff" * 64)),
    "safetensors claiming a huge header": (
        (*WEIGHTS, SAFE),
        (BAD_WEIGHTS,),
        make.weights("w.safetensors", make.safetensors({}, 1 << 60)),
    ),
    "safetensors claiming data beyond its end": (
        (*WEIGHTS, SAFE),
        (BAD_WEIGHTS,),
        make.weights(
            "w.safetensors",
            make.safetensors({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
        ),
    ),
    "npz with a pickle": (VIT, ("w.npz",), make.weights("w.npz", make.npz(a=make.pickled()))),
    "npz with an array of objects": (
        VIT,
        ("w.npz",),
        make.weights("w.npz", make.npz(**{"embedding/kernel": make.npy(np.array([make._Call()], dtype=object))})),
    ),
    "npz claiming a terabyte": (
        VIT,
        ("w.npz",),
        make.weights("w.npz", make.npz(**{"embedding/kernel": make.npy_claiming((1 << 38,))})),
    ),
    "npz that unpacks a thousandfold": (
        VIT,
        ("w.npz", "unpacks to"),
        make.weights("w.npz", make.npz(**{"embedding/kernel": bytes(64 << 20)})),
    ),
    "npz cut in half": (VIT, ("w.npz",), make.weights("w.npz", make.npz(a=make.npy(np.ones(99)))[:60])),
    "npz of another network": (VIT, ("w.npz",), make.weights("w.npz", make.npz(a=make.npy(np.ones(9))))),
    "npz for a network without such a format": (
        (*WEIGHTS, "model.weights=tree/w.npz"),
        ("vision transformers",),
        make.weights("w.npz", make.npz(a=make.npy(np.ones(9)))),
    ),
}
IMAGES: dict[str, Case] = {
    "text": (FOLDER, NO_IMAGE, make.tree_with("evil.png", b"I am a text\n" * 50)),
    "page": (FOLDER, NO_IMAGE, make.tree_with("evil.png", b"<html><body>404</body></html>")),
    "empty": (FOLDER, NO_IMAGE, make.tree_with("evil.png", b"")),
    "pickle": (FOLDER, NO_IMAGE, make.tree_with("evil.png", make.pickled())),
    "postscript, which Pillow hands to another program": (
        FOLDER,
        NO_IMAGE,
        make.tree_with("evil.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"),
    ),
    "format that is not among the endings": (FOLDER, NO_IMAGE, make.tree_with("evil.png", make.encoded("TGA"))),
    "bomb beyond the limit": (FOLDER, NO_IMAGE, make.tree_with("evil.png", make.png(60_000, 60_000))),
    "bomb that only warns": (FOLDER, NO_IMAGE, make.tree_with("evil.png", make.png(10_000, 10_000))),
    "bomb in a comment": (
        FOLDER,
        NO_IMAGE,
        make.tree_with("evil.png", make.png(32, 32, bytes(32 * 97), zlib.compress(bytes(8 << 20)))),
    ),
    "no width": (FOLDER, ("evil.png",), make.tree_with("evil.png", make.png(0, 32))),
    "no data": (FOLDER, NO_IMAGE, make.tree_with("evil.png", make.png(32, 32, b"\0"))),
    "truncated jpeg": (FOLDER, ("evil.jpg", "cannot"), make.tree_with("evil.jpg", make.encoded("JPEG")[:500])),
    "truncated gif": (FOLDER, ("evil.gif", "cannot"), make.tree_with("evil.gif", make.encoded("GIF")[:300])),
    "truncated tiff": (FOLDER, ("evil.tif", "cannot"), make.tree_with("evil.tif", make.encoded("TIFF")[:100])),
    "truncated webp": (FOLDER, ("evil.webp", "cannot"), make.tree_with("evil.webp", make.encoded("WEBP")[:100])),
    "a name with a line break and an escape sequence": (
        FOLDER,
        (r"new line\x1b[31m.png",),
        make.tree_with("new\nline\x1b[31m.png", b"no image"),
    ),
}
TREES: dict[str, Case] = {
    "thousands of stray files, no image": (FOLDER, ("class0", "has no images"), make.stray_files),
    "a thousand empty classes": (FOLDER, ("empty0000", "has no images", "995 more"), make.stray_classes),
    "images where classes should be": (FOLDER, ("0 class folders",), make.files_in_place_of_classes),
    "a link to a text": (FOLDER, ("linked.png", "cannot be read"), make.link_to_a_text),
    "a class that is a loop": (FOLDER, ("class2", "has no images"), make.class_is_a_loop),
    "pipes": (FOLDER, ("class1", "has no images"), make.pipes_in_place_of_images),
    "a file": ((*TINY, "data=folder", "data.root=/etc/passwd"), ("data.root=/etc/passwd is not a folder",), None),
    "devices": ((*TINY, "data=folder", "data.root=/dev"), ("/dev",), None),
}
CASES = {**VALUES, **WEIGHT_FILES, **IMAGES, **TREES}


def test_there_are_at_least_sixty() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize("case", CASES)
def test_one_line_code_two_nothing_executed_nothing_written(command, tmp_path: Path, monkeypatch, case: str) -> None:
    arguments, words, prepare = CASES[case]
    monkeypatch.setattr("razorlab.npz.MAX_NPZ_BYTES", 32 << 20)
    if prepare is not None:
        prepare(tmp_path / "tree")
    before = files_below(tmp_path.parent)
    code, lines = command(*arguments)
    assert code == 2, lines
    assert len(lines) == 1 and lines[0].startswith("train.py: ") and lines[0].isprintable(), lines
    for word in words:
        assert word in lines[0]
    assert files_below(tmp_path.parent) == before, "a file was written"
    assert not (tmp_path / "outputs").exists() and not (tmp_path.parent / "elsewhere").exists()


def test_thousands_of_stray_files_among_images_are_passed_over(command, tmp_path: Path) -> None:
    write_tree(tmp_path / "tree")
    for folder in ("tree", "tree/class0", "tree/class1"):
        for index in range(1000):
            (tmp_path / folder / f".stray{index}.png").touch()
            (tmp_path / folder / f"stray{index}.txt").touch()
    code, lines = command(*FOLDER, "trainer.steps=1", "trainer.device=cpu")
    assert code == 0, lines
    assert len(list((tmp_path / "outputs").rglob("record.json"))) == 1


@pytest.mark.parametrize("raw", [make.pickled(), make.torch_pickled(), b""], ids=["pickle", "torch", "empty"])
def test_a_checkpoint_with_code_in_it_is_not_executed(command, tmp_path: Path, raw: bytes) -> None:
    run = (*TINY, "trainer.steps=1", "data.train_fraction=0.1")
    assert command(*run)[0] == 0
    (record,) = (tmp_path / "outputs").rglob("record.json")
    record.unlink()  # as if the run had been cut off at its end
    checkpoints = [path for path in (record.parent / "checkpoints").iterdir() if path.is_file()]
    for path in checkpoints:
        path.write_bytes(raw)
    code, lines = command(*run)
    assert checkpoints and not (tmp_path / make.MARKER).exists()
    assert code in (0, 2) and not any("Traceback" in line for line in lines), lines


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"schema": 1}', '{"schema": 1, "config": 5, "memory": {}}', "\x00", '{"schema": 1e999}'],
    ids=["deep", "no keys", "wrong types", "zero byte", "infinite"],
)
def test_a_record_that_is_none_is_one_line(tmp_path: Path, capsys, text: str) -> None:
    (tmp_path / "record.json").write_text(text)
    assert razorlab.main(["tables", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "record.json" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_no_configuration_leads_out_of_the_folder_of_runs() -> None:
    config = compose_plain(*TINY)
    folder = run_directory(config, None)
    assert folder.parts[0] == "outputs" and ".." not in folder.parts and config_hash(config) in folder.parts
