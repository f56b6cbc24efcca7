"""The schema of a configuration: every key with its type, default, unit, allowed values and meaning.

It is the one place that names them. Hydra composes on top of its defaults (``transfer.composition``), ``validate``
checks what was composed against it, ``transfer.help`` prints it. The keys of the razor are the library's own fields,
and a group's names are those of its files.

A table of plain keys, and neither Hydra's structured configs nor pydantic models: the former know no ranges and no
choices but enumerations, the latter would stand beside the nested mapping that Hydra composes, records keep and a fresh
process is handed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from backrazor.config import WORDS
from transfer.conflicts import check_conflicts
from transfer.errors import UserError
from transfer.groups import file_names
from transfer.keys import REQUIRED, Key

MIN_IMAGE_SIZE = 32  # every backbone here reduces its input by 32
MOST_IMAGES = 10**6  # in one batch; more is a slip of the keyboard

_RAZOR = tuple(
    Key(f"razor.{name}", str, None, f"{word.meaning}; null is the preset's", word.choices, optional=True)
    for name, word in WORDS.items()
)

KEYS: tuple[Key, ...] = (
    Key("seed", int, 0, "seed of weights, order and augmentation", low=0, high=2**31),
    Key("task.name", str, REQUIRED, "what has a class: an image, a pixel, a text", file_names("task")),
    Key(
        "task.output_stride",
        int,
        None,
        "segmentation: input pixels per position of the backbone's features, 8, 16 or 32",
        low=8,
        high=32,
        optional=True,
    ),
    Key("task.tokens", int, None, "text: longest, in tokens; what is longer is cut", low=8, high=4096, optional=True),
    Key(
        "task.bn_momentum",
        float,
        None,
        "segmentation: how fast the backbone's batch norms take up the data's statistics; null is the network's own",
        low=0,
        high=1,
        open_low=True,
        optional=True,
    ),
    Key(
        "model.name",
        str,
        REQUIRED,
        "backbone; with model=timm the name of any timm classifier, with its pretrained tag",
    ),
    Key("model.pretrained", bool, True, "start from pretrained weights"),
    Key(
        "model.weights",
        str,
        None,
        "weights file; null looks in the package, paths.pretrain, the hub's cache",
        optional=True,
    ),
    Key("model.drop_rate", float, 0.0, "dropout before the head, probability", low=0, high=1, open_high=True),
    Key(
        "model.pos_drop_rate",
        float,
        0.0,
        "dropout after a transformer's position embedding",
        low=0,
        high=1,
        open_high=True,
    ),
    Key("model.mlp_drop_rate", float, 0.0, "dropout, twice in each transformer MLP", low=0, high=1, open_high=True),
    Key(
        "model.head_init",
        str,
        "zero",
        "start of the new head: as torch.nn.Linear, zero, or uniform: weights as linear, biases zero",
        ("linear", "zero", "uniform"),
    ),
    Key("data.name", str, REQUIRED, "data set"),
    Key("data.root", str, None, "folder that holds the images; null is paths.data/<name>", optional=True),
    Key("data.image_size", int, 224, "side of the square input, pixels", low=MIN_IMAGE_SIZE, high=1024),
    Key("data.train_fraction", float, 1.0, "share of the training split that is used", low=0, high=1, open_low=True),
    Key("data.val_fraction", float, 0.1, "share for validation where none is given", low=0, high=0.5, open_low=True),
    Key("data.test_fraction", float, 0.2, "share for test where none is given", low=0, high=0.9, open_low=True),
    Key("data.split_seed", int, 0, "seed of the splits that are drawn here", low=0, high=2**31),
    Key(
        "data.protocol",
        str,
        "validation",
        "validation: the best epoch on held-out images; official: the last weights, all training images train",
        ("validation", "official"),
    ),
    Key(
        "data.official_test",
        str,
        "test",
        "what protocol=official reports on: test, or validation images",
        ("test", "val"),
    ),
    Key("data.val_file", str, None, "text file of validation images, a name per line; null draws them", optional=True),
    Key(
        "data.train_transform",
        str,
        "random_crop",
        "how a training image is brought to size; scale_crop for segmentation alone",
        ("plain", "random_crop", "resize_crop", "scale_crop"),
    ),
    Key(
        "data.eval_transform",
        str,
        None,
        "how an image is brought to size in evaluation; null follows data.train_transform",
        ("squash", "center_crop", "squash_crop"),
        optional=True,
    ),
    Key("data.interpolation", str, "bilinear", "between pixels, in crops and resizes", ("bilinear", "bicubic")),
    Key(
        "data.crop_scale_min",
        float,
        0.22,
        "smallest area of random_crop, share of the image",
        low=0,
        high=1,
        open_low=True,
    ),
    Key("data.flip", bool, True, "mirror half of the training images"),
    Key("data.color_jitter", float, 0.0, "brightness, contrast and saturation jitter, share", low=0, high=1),
    Key("data.hue_jitter", float, 0.0, "hue jitter, share of the colour circle", low=0, high=0.5),
    Key("data.cache", bool, False, "keep decoded images in memory (uint8)"),
    Key("razor.name", str, REQUIRED, "preset", file_names("razor")),
    Key("razor.sparsity", float, 0.9, "share of each saved activation that is pruned", low=0, high=1, open_high=True),
    Key(
        "razor.head_sparsity",
        float,
        None,
        "the same for the head; null is razor.sparsity",
        low=0,
        high=1,
        open_high=True,
        optional=True,
    ),
    *_RAZOR,
    Key("razor.dense", str, None, "layers left dense: patterns of names, separated by commas", optional=True),
    Key("razor.forward", str, "dense", "ablation: prune the forward pass, too", ("dense", "pruned")),
    Key(
        "razor.selection", str, "magnitude", "ablation: keep the largest, or as many at random", ("magnitude", "random")
    ),
    Key("method.name", str, REQUIRED, "which parameters train besides the head", file_names("method")),
    Key("method.bn_affine", str, "train", "batch norm's scale and shift", ("train", "frozen")),
    Key(
        "method.bn_stats",
        str,
        "batch",
        "batch norm's mean and variance: of the batch, or as pretrained",
        ("batch", "frozen"),
    ),
    Key(
        "method.frozen_bits",
        int,
        None,
        "bits that frozen weights are stored in, by k-means; null is as they came",
        low=8,
        high=8,
        optional=True,
    ),
    Key("optim.name", str, REQUIRED, "optimizer", file_names("optim")),
    Key("optim.lr", float, REQUIRED, "peak learning rate", low=0, high=1e38, open_low=True),
    Key("optim.weight_decay", float, 0.0, "weight decay", low=0, high=1000),
    Key("optim.momentum", float, 0.9, "momentum of sgd", low=0, high=1, open_high=True),
    Key(
        "optim.head_lr_multiplier",
        float,
        1.0,
        "the head's learning rate, times optim.lr",
        low=0,
        high=1000,
        open_low=True,
    ),
    Key("optim.schedule", str, "cosine", "learning rate by step", ("cosine", "constant", "poly", "linear")),
    Key("optim.warmup_steps", int, 0, "linear warm-up, optimizer steps", low=0, high=10**9),
    Key("optim.label_smoothing", float, 0.1, "label smoothing", low=0, high=1, open_high=True),
    Key("optim.grad_clip", float, None, "largest gradient norm", low=0, high=10**6, open_low=True, optional=True),
    Key(
        "optim.grad_clip_each",
        float,
        None,
        "largest norm of each parameter's gradient",
        low=0,
        high=10**6,
        open_low=True,
        optional=True,
    ),
    Key(
        "optim.state_bits",
        int,
        None,
        "bits that the optimizer's state is stored in, by bitsandbytes; null is the weights' type",
        low=8,
        high=8,
        optional=True,
    ),
    Key("trainer.epochs", int, 5, "passes over the training split", low=1, high=10**6),
    Key("trainer.steps", int, None, "optimizer steps; overrides trainer.epochs", low=1, high=10**9, optional=True),
    Key("trainer.batch_size", int, 16, "images per optimizer step, over all processes", low=1, high=MOST_IMAGES),
    Key("trainer.drop_last", bool, True, "leave images that do not fill the epoch's last batch out of it"),
    Key(
        "trainer.micro_batch",
        int,
        None,
        "images per forward (gradient accumulation); null is all",
        low=1,
        high=MOST_IMAGES,
        optional=True,
    ),
    Key("trainer.eval_batch_size", int, 64, "images per forward in evaluation", low=1, high=MOST_IMAGES),
    Key("trainer.eval_every", int, 1, "epochs between evaluations on the validation split", low=1, high=10**6),
    Key(
        "trainer.precision",
        str,
        "float32",
        "forward in float32, or under autocast; float16 scales the loss",
        ("float32", "bfloat16", "float16"),
    ),
    Key("trainer.channels_last", bool, False, "images and weights with channels last in memory"),
    Key("trainer.compile", bool, False, "torch.compile the network that trains; needs a C++ compiler"),
    Key("trainer.cuda_graph", bool, False, "capture the training step as CUDA graphs; one GPU, no recomputation"),
    Key("trainer.release_gradients", bool, False, "step each parameter during backward, and free its gradient"),
    Key("trainer.checkpointing", str, "none", "recompute activations by block or stage", ("none", "block", "stage")),
    Key(
        "trainer.resume",
        str,
        "auto",
        "auto: go on with this configuration's run; never: start it over",
        ("auto", "never"),
    ),
    Key("trainer.save_every", int, 500, "optimizer steps between checkpoints within an epoch", low=1, high=10**9),
    Key("trainer.keep", int, 2, "newest checkpoints that stay, besides the best weights", low=1, high=1000),
    Key(
        "trainer.nonfinite", str, "stop", "a step with NaN or Inf: end the run, or leave the step out", ("stop", "skip")
    ),
    Key("trainer.deterministic", bool, False, "deterministic torch algorithms only"),
    Key("trainer.device", str, "auto", "device", ("auto", "cpu", "cuda")),
    Key(
        "trainer.workers",
        int,
        None,
        "data worker processes; null is 0 on the CPU, on CUDA this process's share of the cores, at most 8",
        low=0,
        high=256,
        optional=True,
    ),
    Key("trainer.threads", int, None, "torch threads; null is torch's choice", low=1, high=1024, optional=True),
    Key("trainer.progress", bool, True, "show a progress bar"),
    Key(
        "trainer.measure.mode",
        str,
        "all",
        "memory columns: none, saved (in this process) or all (fresh processes, too)",
        ("none", "saved", "all"),
    ),
    Key(
        "trainer.measure.batch_size",
        int,
        None,
        "images in the measured step; null is trainer.batch_size",
        low=1,
        high=10**6,
        optional=True,
    ),
    Key(
        "trainer.measure.image_size",
        int,
        None,
        "its image side, pixels; null is data.image_size",
        low=MIN_IMAGE_SIZE,
        high=1024,
        optional=True,
    ),
    Key("trainer.measure.repeats", int, 3, "fresh processes per figure", low=1, high=100),
    Key("trainer.measure.steps", int, 5, "timed steps per process", low=1, high=1000),
    Key("paths.outputs", str, "outputs", "folder of the runs"),
    Key("paths.data", str, "data", "folder of the data sets"),
    Key("paths.pretrain", str, "pretrain", "folder of the pretrained weights"),
)

BY_PATH = {key.path: key for key in KEYS}


def defaults() -> dict[str, Any]:
    """Return the nested mapping of every key's default."""
    nested: dict[str, Any] = {}
    for key in KEYS:
        *sections, name = key.path.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = key.default
    return nested


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and value of every leaf of a nested mapping."""
    for name, value in config.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{path}.")
        else:
            yield path, value


def validate(config: Mapping[str, Any]) -> None:
    """Check a composed configuration, a nested dict of plain values.

    Raises:
        UserError: a key is unknown or missing, a value is not allowed, or two settings contradict each other.
    """
    given = dict(flatten(config))
    for path in given:
        if path not in BY_PATH:
            raise UserError(f"{path} is not a key: `python train.py --help` lists them all")
    for path, key in BY_PATH.items():
        if path not in given:
            raise UserError(f"{path} is missing: it takes {key.allowed} ({key.help})")
        key.check(given[path])
    check_conflicts(given)
