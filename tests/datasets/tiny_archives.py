"""Each published data set in miniature: the same names, folders and formats, a few images, own checksums."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from razorlab.data.published import PUBLISHED, PublishedSpec

CIFAR_PER_CLASS = 4  # training images


def jpeg(label: int) -> bytes:
    """A picture of 20x16 pixels whose colour tells its class."""
    colour = (label * 37 % 256, label * 91 % 256, 255 - label * 53 % 256)
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def png(values: np.ndarray) -> bytes:
    """A picture whose pixel values are ``values``, (H, W)."""
    buffer = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def tar_gz(path: Path, members: Mapping[str, bytes]) -> None:
    """Write a gzipped tar with its folders as members of their own, as the published ones have them; a plain one where
    its name says so."""
    packed = {} if path.suffix == ".tar" else {"compresslevel": 1}
    with tarfile.open(path, "w:gz" if packed else "w", **packed) as tar:
        folders = {str(parent) for name in members for parent in Path(name).parents if str(parent) != "."}
        for folder in sorted(folders):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def mat(variables: Mapping[str, object]) -> bytes:
    """A MATLAB file."""
    buffer = io.BytesIO()
    savemat(buffer, dict(variables), do_compression=True)
    return buffer.getvalue()


def python2_pickle(value: object) -> bytes:
    """What Python 2's cPickle writes with protocol 2 for dicts, lists, str, int and uint8 arrays."""
    return b"\x80\x02" + _pickled(value) + b"."


def _pickled(value: object) -> bytes:
    if isinstance(value, str | bytes):
        raw = value.encode("latin1") if isinstance(value, str) else value
        return (b"U" + bytes([len(raw)]) if len(raw) < 256 else b"T" + struct.pack("<i", len(raw))) + raw
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(_pickled, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_pickled(key) + _pickled(item) for key, item in value.items()) + b"u"
    assert isinstance(value, np.ndarray) and value.dtype == np.uint8
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
    shape = b"".join(map(_pickled, value.shape)) + b"\x86"
    return empty + b"(K\x01" + shape + dtype + b"\x89" + _pickled(value.tobytes()) + b"tb"


def cifar_batch(labels: list[int], label_key: str) -> bytes:
    """One file of images; each image's pixels are its label, so that order can be checked."""
    data = np.repeat(np.array(labels, dtype=np.uint8)[:, None], 3072, axis=1)
    names = [f"image_{i}_s_000001.png" for i in range(len(labels))]
    return python2_pickle({"batch_label": "a batch", label_key: labels, "data": data, "filenames": names})


def _cifar10(folder: Path) -> tuple[int, int, int]:
    batches = {f"data_batch_{i}": cifar_batch(list(range(10)), "labels") for i in range(1, 6)}
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    meta = python2_pickle({"num_cases_per_batch": 10, "label_names": names, "num_vis": 3072})
    members = {**batches, "test_batch": cifar_batch(list(range(9, -1, -1)), "labels"), "batches.meta": meta}
    members["readme.html"] = b"<meta>"
    tar_gz(folder / "cifar-10-python.tar.gz", {f"cifar-10-batches-py/{name}": raw for name, raw in members.items()})
    return 10, 50, 10


def _cifar100(folder: Path) -> tuple[int, int, int]:
    fine = [f"class_{i}" for i in range(100)]
    members = {
        "train": cifar_batch(list(range(100)) * CIFAR_PER_CLASS, "fine_labels"),
        "test": cifar_batch(list(range(100)), "fine_labels"),
        "meta": python2_pickle({"fine_label_names": fine, "coarse_label_names": ["a", "b"]}),
        "file.txt~": b"",
    }
    tar_gz(folder / "cifar-100-python.tar.gz", {f"cifar-100-python/{name}": raw for name, raw in members.items()})
    return 100, 100 * CIFAR_PER_CLASS, 100


def _flowers(folder: Path) -> tuple[int, int, int]:
    classes, per_class = 102, 3
    labels = np.repeat(np.arange(1, classes + 1, dtype=np.uint8), per_class)
    numbers = np.arange(1, len(labels) + 1).reshape(classes, per_class)
    ids = {name: numbers[:, i][None].astype(np.uint16) for i, name in enumerate(("trnid", "valid", "tstid"))}
    images = {f"jpg/image_{i:05d}.jpg": jpeg(int(label)) for i, label in enumerate(labels, 1)}
    tar_gz(folder / "102flowers.tgz", images)
    (folder / "imagelabels.mat").write_bytes(mat({"labels": labels[None]}))
    (folder / "setid.mat").write_bytes(mat(ids))
    return classes, 2 * classes, classes


def _pets(folder: Path) -> tuple[int, int, int]:
    breeds = ["Abyssinian", "american_bulldog", "Bengal"]
    images, lines, trimaps = {}, {"trainval": [], "test": []}, {}
    for label, breed in enumerate(breeds, 1):
        for number in range(1, 7):
            part = "trainval" if number <= 4 else "test"
            lines[part].append(f"{breed}_{number} {label} {2 if breed.islower() else 1} {label}")
            images[f"images/{breed}_{number}.jpg"] = jpeg(label)
            trimaps[f"annotations/trimaps/{breed}_{number}.png"] = png(np.resize([1, 2, 3, 2], (16, 20)))
    texts = {f"annotations/{part}.txt": ("\n".join(rows) + "\n").encode() for part, rows in lines.items()}
    tar_gz(folder / "images.tar.gz", images)
    tar_gz(folder / "annotations.tar.gz", {"annotations/README": b"", **texts, **trimaps})
    return 3, 12, 6


def _car_annotations(files: list[str], labels: list[int]) -> dict[str, np.ndarray]:
    fields = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
    rows = np.empty((1, len(files)), dtype=[(field, object) for field in fields])
    for i, (file, label) in enumerate(zip(files, labels, strict=True)):
        rows[0, i] = (*(np.array([[v]], dtype=np.uint16) for v in (1, 1, 9, 9)), np.array([[label]], np.uint8), file)
    return {"annotations": rows}


def _cars(folder: Path) -> tuple[int, int, int]:
    names = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo Convertible 2012"]
    parts = {"train": [1, 2, 3] * 3, "test": [3, 2, 1]}
    annotations = {}
    for part, labels in parts.items():
        files = [f"{i:05d}.jpg" for i in range(1, len(labels) + 1)]
        tar_gz(
            folder / f"cars_{part}.tgz",
            {f"cars_{part}/{file}": jpeg(label) for file, label in zip(files, labels, strict=True)},
        )
        annotations[part] = mat(_car_annotations(files, labels))
    cells = np.array([[*names]], dtype=object)
    devkit = {"cars_train_annos.mat": annotations["train"], "cars_meta.mat": mat({"class_names": cells})}
    devkit["README.txt"] = b"cars"
    tar_gz(folder / "car_devkit.tgz", {f"devkit/{name}": raw for name, raw in devkit.items()})
    (folder / "cars_test_annos_withlabels.mat").write_bytes(annotations["test"])
    return 3, 9, 3


def _aircraft(folder: Path) -> tuple[int, int, int]:
    variants = ["707-320", "Boeing 717", "F/A-18"]  # one with a space and one with a slash, as there are
    members = {"variants.txt": "\n".join(variants) + "\n"}
    number = 34958
    for part, per_class in (("trainval", 4), ("test", 2)):
        lines = []
        for label, variant in enumerate(variants * per_class):
            number += 1
            lines.append(f"{number:07d} {variant}")
            members[f"images/{number:07d}.jpg"] = jpeg(label % 3)
        members[f"images_variant_{part}.txt"] = "\n".join(lines) + "\n"
    raw = {
        f"fgvc-aircraft-2013b/data/{name}": content if isinstance(content, bytes) else content.encode()
        for name, content in members.items()
    }
    tar_gz(folder / "fgvc-aircraft-2013b.tar.gz", {"fgvc-aircraft-2013b/README.html": b"", **raw})
    return 3, 12, 6


def _food101(folder: Path) -> tuple[int, int, int]:
    names = ["apple_pie", "baby_back_ribs", "waffles"]
    lists = {part: {name: [f"{name}/{i + first}" for i in range(count)] for name in names}
             for part, first, count in (("train", 1000, 4), ("test", 2000, 2))}  # fmt: skip
    images = {
        f"food-101/images/{file}.jpg": jpeg(names.index(name))
        for part in lists.values()
        for name, files in part.items()
        for file in files
    }
    meta = {f"food-101/meta/{part}.json": json.dumps(content).encode() for part, content in lists.items()}
    meta["food-101/meta/classes.txt"] = "\n".join(names).encode()
    tar_gz(folder / "food-101.tar.gz", {**images, **meta, "food-101/README.txt": b""})
    return 3, 12, 6


def _cub200(folder: Path) -> tuple[int, int, int]:
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "200.Common_Yellowthroat"]
    rows: dict[str, list[str]] = {"images": [], "image_class_labels": [], "train_test_split": [], "classes": []}
    images, number = {}, 0
    for label, name in enumerate(names, 1):
        rows["classes"].append(f"{label} {name}")
        for i in range(6):
            number += 1
            file = f"{name}/{name.partition('.')[2]}_{i:04d}_18.jpg"
            images[f"CUB_200_2011/images/{file}"] = jpeg(label)
            rows["images"].append(f"{number} {file}")
            rows["image_class_labels"].append(f"{number} {label}")
            rows["train_test_split"].append(f"{number} {int(i % 3 != 0)}")
    texts = {f"CUB_200_2011/{name}.txt": ("\n".join(lines) + "\n").encode() for name, lines in rows.items()}
    tar_gz(folder / "CUB_200_2011.tgz", {"attributes.txt": b"", **texts, **images})
    return 3, 12, 6


def _voc(folder: Path) -> tuple[int, int, int]:
    """Four training and four validation images of VOC; SBD has two of each of them and four of its own."""
    parts = {"train": [f"2007_{n:06d}" for n in range(4)], "val": [f"2008_{n:06d}" for n in range(4)]}
    own = [f"2009_{n:06d}" for n in range(4)]
    base, inside = "VOCdevkit/VOC2012", "benchmark_RELEASE/dataset"
    mask = np.resize([0, 5, 255, 20], (16, 20)).astype(np.uint8)
    members = {f"{base}/ImageSets/Segmentation/{part}.txt": _lines(names) for part, names in parts.items()}
    members |= {f"{base}/JPEGImages/{name}.jpg": jpeg(1) for name in (*parts["train"], *parts["val"], *own)}
    members |= {f"{base}/SegmentationClass/{n}.png": png(mask) for n in (*parts["train"], *parts["val"])}
    tar_gz(folder / "VOCtrainval_11-May-2012.tar", members)
    further = {"train": [*parts["train"][:2], *own[:2]], "val": [*parts["val"][:2], *own[2:]]}
    content = {f"{inside}/{part}.txt": _lines(names) for part, names in further.items()}
    truth = mat({"GTcls": {"Segmentation": mask, "Boundaries": 0, "CategoriesPresent": [5, 20]}})
    content |= {f"{inside}/cls/{name}.mat": truth for names in further.values() for name in names}
    tar_gz(folder / "benchmark.tgz", content)
    return 21, 8, 4


def _lines(names: list[str]) -> bytes:
    return ("\n".join(names) + "\n").encode()


def _vader(folder: Path) -> tuple[int, int, int]:
    """Ten documents per file: of each file's fifth and tenth the sentences are for testing. One per file is neutral."""
    inner, names = io.BytesIO(), ("tweets", "movieReviewSnippets", "nytEditorialSnippets", "amazonReviewSnippets")
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for name in names:
            rows = [
                f"{n}_1\t{(-1) ** n * 2.5}\tsentence {n} of {name}, {'bad' if n % 2 else 'good'}" for n in range(10)
            ]
            rows += [f"{n}_2\t{(-1) ** n * 1.5}\tit goes on, {'bad' if n % 2 else 'good'} {n}" for n in range(10)]
            content = "\r\n".join([*rows, "3_3\t0.25\tneither"]).encode() + b"\r\n"
            entry = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    base = "vaderSentiment-3.3.2"
    members = {f"{base}/additional_resources/hutto_ICWSM_2014.tar.gz": inner.getvalue(), f"{base}/setup.py": b"1 / 0"}
    tar_gz(folder / f"{base}.tar.gz", members)
    return 2, 64, 16


MAKERS: dict[str, Callable[[Path], tuple[int, int, int]]] = {
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "flowers": _flowers,
    "pets": _pets,
    "cars": _cars,
    "aircraft": _aircraft,
    "cub200": _cub200,
    "food101": _food101,
    "voc": _voc,
    "vader": _vader,
}


def with_checksums(spec: PublishedSpec, files: Path, url: str | None = None) -> PublishedSpec:
    """Return ``spec`` with the checksums of the files in ``files``; what is offered is offered below ``url``."""
    archives = tuple(
        replace(
            archive,
            md5=hashlib.md5((files / archive.name).read_bytes()).hexdigest(),
            url=archive.url and f"{url or 'http://127.0.0.1:9'}/{archive.name}",
        )
        for archive in spec.archives
    )
    return replace(spec, archives=archives)


def make_tiny(name: str, files: Path) -> PublishedSpec:
    """Write the published files of data set ``name`` in miniature into ``files``; return what is known of them."""
    files.mkdir(parents=True, exist_ok=True)
    classes, train, test = MAKERS[name](files)
    spec = replace(PUBLISHED[name], classes=classes, train=train, test=test)
    if name.startswith("cifar"):
        spec = replace(spec, read=partial(spec.read.func, dataset=_tiny_cifar(spec, files)))
    return with_checksums(spec, files)


def _tiny_cifar(spec: PublishedSpec, files: Path) -> type:
    """torchvision's class with the checksums of the files in the archive."""
    theirs = spec.read.keywords["dataset"]
    with tarfile.open(files / theirs.filename) as tar:

        def md5(name: str) -> str:
            return hashlib.md5(tar.extractfile(f"{theirs.base_folder}/{name}").read()).hexdigest()

        parts = {part: [[name, md5(name)] for name, _ in getattr(theirs, part)] for part in ("train_list", "test_list")}
        return type(theirs.__name__, (theirs,), parts | {"meta": theirs.meta | {"md5": md5(theirs.meta["filename"])}})
