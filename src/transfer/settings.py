"""Every configuration key of the laboratory: its type, unit, allowed values and meaning.

One table serves three ends: ``validate`` checks a composed configuration against it, ``transfer.help`` prints it, and
a test compares it with the files in ``configs/``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transfer.conflicts import check_conflicts
from transfer.errors import UserError
from transfer.keys import Key

MIN_IMAGE_SIZE = 32  # every backbone here reduces its input by 32
MOST_IMAGES = 10**6  # in one batch; more is a slip of the keyboard


RAZOR_PRESETS = ("none", "paper", "compact", "int8")
METHODS = ("full", "last", "norm_last", "bias", "lora", "tinytl_l", "tinytl_lb")
CHECKPOINTING = ("none", "block", "stage")

KEYS: tuple[Key, ...] = (
    Key("seed", int, "seed of weights, order and augmentation", low=0, high=2**31),
    Key("task.name", str, "what has a class: an image, a pixel, a text", ("classification", "segmentation", "text")),
    Key(
        "task.output_stride",
        int,
        "segmentation: input pixels per position of the backbone's features, 8, 16 or 32",
        low=8,
        high=32,
        optional=True,
    ),
    Key("task.tokens", int, "text: longest, in tokens; what is longer is cut", low=8, high=4096, optional=True),
    Key(
        "task.bn_momentum",
        float,
        "segmentation: how fast the backbone's batch norms take up the data's statistics; null is the network's own",
        low=0,
        high=1,
        open_low=True,
        optional=True,
    ),
    Key("model.name", str, "backbone; with model=timm the name of any timm classifier, with its pretrained tag"),
    Key("model.pretrained", bool, "start from pretrained weights"),
    Key(
        "model.weights", str, "weights file; null looks in the package, paths.pretrain, the hub's cache", optional=True
    ),
    Key("model.drop_rate", float, "dropout before the head, probability", low=0, high=1, open_high=True),
    Key(
        "model.pos_drop_rate", float, "dropout after a transformer's position embedding", low=0, high=1, open_high=True
    ),
    Key("model.mlp_drop_rate", float, "dropout, twice in each transformer MLP", low=0, high=1, open_high=True),
    Key(
        "model.head_init",
        str,
        "start of the new head: as torch.nn.Linear, zero, or uniform: weights as linear, biases zero",
        ("linear", "zero", "uniform"),
    ),
    Key("data.name", str, "data set"),
    Key("data.root", str, "folder that holds the images; null is paths.data/<name>", optional=True),
    Key("data.image_size", int, "side of the square input, pixels", low=MIN_IMAGE_SIZE, high=1024),
    Key("data.train_fraction", float, "share of the training split that is used", low=0, high=1, open_low=True),
    Key("data.val_fraction", float, "share for validation where none is given", low=0, high=0.5, open_low=True),
    Key("data.test_fraction", float, "share for test where none is given", low=0, high=0.9, open_low=True),
    Key("data.split_seed", int, "seed of the splits that are drawn here", low=0, high=2**31),
    Key(
        "data.protocol",
        str,
        "validation: the best epoch on held-out images; official: the last weights, all training images train",
        ("validation", "official"),
    ),
    Key("data.official_test", str, "what protocol=official reports on: test, or validation images", ("test", "val")),
    Key("data.val_file", str, "text file of validation images, a name per line; null draws them", optional=True),
    Key(
        "data.train_transform",
        str,
        "how a training image is brought to size; scale_crop for segmentation alone",
        ("plain", "random_crop", "resize_crop", "scale_crop"),
    ),
    Key(
        "data.eval_transform",
        str,
        "how an image is brought to size in evaluation; null follows data.train_transform",
        ("squash", "center_crop", "squash_crop"),
        optional=True,
    ),
    Key("data.interpolation", str, "between pixels, in crops and resizes", ("bilinear", "bicubic")),
    Key("data.crop_scale_min", float, "smallest area of random_crop, share of the image", low=0, high=1, open_low=True),
    Key("data.flip", bool, "mirror half of the training images"),
    Key("data.color_jitter", float, "brightness, contrast and saturation jitter, share", low=0, high=1),
    Key("data.hue_jitter", float, "hue jitter, share of the colour circle", low=0, high=0.5),
    Key("data.cache", bool, "keep decoded images in memory (uint8)"),
    Key("razor.name", str, "preset", RAZOR_PRESETS),
    Key("razor.sparsity", float, "share of each saved activation that is pruned", low=0, high=1, open_high=True),
    Key(
        "razor.head_sparsity",
        float,
        "the same for the head; null is razor.sparsity",
        low=0,
        high=1,
        open_high=True,
        optional=True,
    ),
    Key(
        "razor.values",
        str,
        "type of kept values; null is the preset's",
        ("float32", "float16", "bfloat16", "int8", "int4", "paper"),
        optional=True,
    ),
    Key("razor.index", str, "index format; null is the preset's", ("bitmap", "tile", "auto"), optional=True),
    Key(
        "razor.fill",
        str,
        "what is read for a dropped element; null is the preset's",
        ("zero", "mean", "known"),
        optional=True,
    ),
    Key(
        "razor.norm",
        str,
        "how norm layers keep their input; null is the preset's",
        ("dense", "pruned", "bfloat16", "int8", "int4"),
        optional=True,
    ),
    Key(
        "razor.batch_norm",
        str,
        "how batch norm on batch statistics keeps its input; null is the preset's",
        ("dense", "pruned", "bfloat16", "int8", "int4"),
        optional=True,
    ),
    Key(
        "razor.activation",
        str,
        "how smooth activations keep their derivative; null is the preset's",
        ("dense", "float16", "int8", "int4", "int2", "auto"),
        optional=True,
    ),
    Key(
        "razor.attention",
        str,
        "how attention keeps q, k, v and scores; null is the preset's",
        ("dense", "pruned", "int8", "int4"),
        optional=True,
    ),
    Key(
        "razor.rest",
        str,
        "how what autograd keeps beside the layers above is kept; null is the preset's",
        ("dense", "int8"),
        optional=True,
    ),
    Key("razor.dense", str, "layers left dense: patterns of names, separated by commas", optional=True),
    Key("razor.forward", str, "ablation: prune the forward pass, too", ("dense", "pruned")),
    Key("razor.selection", str, "ablation: keep the largest, or as many at random", ("magnitude", "random")),
    Key("method.name", str, "which parameters train besides the head", METHODS),
    Key("method.bn_affine", str, "batch norm's scale and shift", ("train", "frozen")),
    Key("method.bn_stats", str, "batch norm's mean and variance: of the batch, or as pretrained", ("batch", "frozen")),
    Key(
        "method.frozen_bits",
        int,
        "bits that frozen weights are stored in, by k-means; null is as they came",
        low=8,
        high=8,
        optional=True,
    ),
    Key("optim.name", str, "optimizer", ("adam", "adamw", "sgd")),
    Key("optim.lr", float, "peak learning rate", low=0, high=1e38, open_low=True),
    Key("optim.weight_decay", float, "weight decay", low=0, high=1000),
    Key("optim.momentum", float, "momentum of sgd", low=0, high=1, open_high=True),
    Key("optim.head_lr_multiplier", float, "the head's learning rate, times optim.lr", low=0, high=1000, open_low=True),
    Key("optim.schedule", str, "learning rate by step", ("cosine", "constant", "poly", "linear")),
    Key("optim.warmup_steps", int, "linear warm-up, optimizer steps", low=0, high=10**9),
    Key("optim.label_smoothing", float, "label smoothing", low=0, high=1, open_high=True),
    Key("optim.grad_clip", float, "largest gradient norm", low=0, high=10**6, open_low=True, optional=True),
    Key(
        "optim.grad_clip_each",
        float,
        "largest norm of each parameter's gradient",
        low=0,
        high=10**6,
        open_low=True,
        optional=True,
    ),
    Key(
        "optim.state_bits",
        int,
        "bits that the optimizer's state is stored in, by bitsandbytes; null is the weights' type",
        low=8,
        high=8,
        optional=True,
    ),
    Key("trainer.epochs", int, "passes over the training split", low=1, high=10**6),
    Key("trainer.steps", int, "optimizer steps; overrides trainer.epochs", low=1, high=10**9, optional=True),
    Key("trainer.batch_size", int, "images per optimizer step, over all processes", low=1, high=MOST_IMAGES),
    Key("trainer.drop_last", bool, "leave images that do not fill the epoch's last batch out of it"),
    Key(
        "trainer.micro_batch",
        int,
        "images per forward (gradient accumulation); null is all",
        low=1,
        high=MOST_IMAGES,
        optional=True,
    ),
    Key("trainer.eval_batch_size", int, "images per forward in evaluation", low=1, high=MOST_IMAGES),
    Key("trainer.eval_every", int, "epochs between evaluations on the validation split", low=1, high=10**6),
    Key(
        "trainer.precision",
        str,
        "forward in float32, or under autocast; float16 scales the loss",
        ("float32", "bfloat16", "float16"),
    ),
    Key("trainer.channels_last", bool, "images and weights with channels last in memory"),
    Key("trainer.compile", bool, "torch.compile the network that trains; needs a C++ compiler"),
    Key("trainer.cuda_graph", bool, "capture the training step as CUDA graphs; one GPU, no recomputation"),
    Key("trainer.release_gradients", bool, "step each parameter during backward, and free its gradient"),
    Key("trainer.checkpointing", str, "recompute activations by block or stage", CHECKPOINTING),
    Key("trainer.resume", str, "auto: go on with this configuration's run; never: start it over", ("auto", "never")),
    Key("trainer.save_every", int, "optimizer steps between checkpoints within an epoch", low=1, high=10**9),
    Key("trainer.keep", int, "newest checkpoints that stay, besides the best weights", low=1, high=1000),
    Key("trainer.nonfinite", str, "a step with NaN or Inf: end the run, or leave the step out", ("stop", "skip")),
    Key("trainer.deterministic", bool, "deterministic torch algorithms only"),
    Key("trainer.device", str, "device", ("auto", "cpu", "cuda")),
    Key(
        "trainer.workers",
        int,
        "data worker processes; null is 0 on the CPU, on CUDA this process's share of the cores, at most 8",
        low=0,
        high=256,
        optional=True,
    ),
    Key("trainer.threads", int, "torch threads; null is torch's choice", low=1, high=1024, optional=True),
    Key("trainer.progress", bool, "show a progress bar"),
    Key(
        "trainer.measure.mode",
        str,
        "memory columns: none, saved (in this process) or all (fresh processes, too)",
        ("none", "saved", "all"),
    ),
    Key(
        "trainer.measure.batch_size",
        int,
        "images in the measured step; null is trainer.batch_size",
        low=1,
        high=10**6,
        optional=True,
    ),
    Key(
        "trainer.measure.image_size",
        int,
        "its image side, pixels; null is data.image_size",
        low=MIN_IMAGE_SIZE,
        high=1024,
        optional=True,
    ),
    Key("trainer.measure.repeats", int, "fresh processes per figure", low=1, high=100),
    Key("trainer.measure.steps", int, "timed steps per process", low=1, high=1000),
    Key("paths.outputs", str, "folder of the runs"),
    Key("paths.data", str, "folder of the data sets"),
    Key("paths.pretrain", str, "folder of the pretrained weights"),
)

BY_PATH = {key.path: key for key in KEYS}


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
