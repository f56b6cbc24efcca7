"""The schema of a configuration: every key with its type, default, unit, allowed values and meaning.

It is the one place that names them. Hydra composes on top of its defaults (``razorlab.composition``),
``razorlab.settings`` checks what was composed against it and hands it on as a ``Config``, ``razorlab.help`` prints it.
So mypy knows every key that code reads, its type and its words. The keys of the razor's words are the library's own
fields, and a group's names are those of its files.

Typed dictionaries, and neither Hydra's structured configs nor pydantic models: the former know no ranges and no choices
but enumerations, the latter would stand beside the nested mapping that Hydra composes, records keep and a fresh process
is handed. A ``TypedDict`` is that mapping.
"""

from typing import Annotated, Literal, TypedDict  # annotations are read here: none of them is put off

from backrazor.config import WORDS
from razorlab.groups import file_names
from razorlab.keys import REQUIRED, Key, keys_of

MIN_IMAGE_SIZE = 32  # every backbone here reduces its input by 32
MOST_IMAGES = 10**6  # in one batch; more is a slip of the keyboard


class Task(TypedDict):
    name: Annotated[str, Key(REQUIRED, "what has a class: an image, a pixel, a text", file_names("task"))]
    output_stride: Annotated[
        int | None,
        Key(None, "segmentation: input pixels per position of the backbone's features, 8, 16 or 32", low=8, high=32),
    ]
    tokens: Annotated[int | None, Key(None, "text: longest, in tokens; what is longer is cut", low=8, high=4096)]
    bn_momentum: Annotated[
        float | None,
        Key(
            None,
            "segmentation: how fast the backbone's batch norms take up the data's statistics; null is the network's "
            "own",
            low=0,
            high=1,
            open_low=True,
        ),
    ]


class Model(TypedDict):
    name: Annotated[
        str, Key(REQUIRED, "backbone; with model=timm the name of any timm classifier, with its pretrained tag")
    ]
    pretrained: Annotated[bool, Key(True, "start from pretrained weights")]
    weights: Annotated[
        str | None, Key(None, "weights file; null looks in the package, paths.pretrain, the hub's cache")
    ]
    drop_rate: Annotated[float, Key(0.0, "dropout before the head, probability", low=0, high=1, open_high=True)]
    pos_drop_rate: Annotated[
        float, Key(0.0, "dropout after a transformer's position embedding", low=0, high=1, open_high=True)
    ]
    mlp_drop_rate: Annotated[float, Key(0.0, "dropout, twice in each transformer MLP", low=0, high=1, open_high=True)]
    head_init: Annotated[
        Literal["linear", "zero", "uniform"],
        Key("zero", "start of the new head: as torch.nn.Linear, zero, or uniform: weights as linear, biases zero"),
    ]


class Data(TypedDict):
    name: Annotated[str, Key(REQUIRED, "data set")]
    root: Annotated[str | None, Key(None, "folder that holds the images; null is paths.data/<name>")]
    image_size: Annotated[int, Key(224, "side of the square input, pixels", low=MIN_IMAGE_SIZE, high=1024)]
    train_fraction: Annotated[float, Key(1.0, "share of the training split that is used", low=0, high=1, open_low=True)]
    val_fraction: Annotated[float, Key(0.1, "share for validation where none is given", low=0, high=0.5, open_low=True)]
    test_fraction: Annotated[float, Key(0.2, "share for test where none is given", low=0, high=0.9, open_low=True)]
    split_seed: Annotated[int, Key(0, "seed of the splits that are drawn here", low=0, high=2**31)]
    protocol: Annotated[
        Literal["validation", "official"],
        Key(
            "validation",
            "validation: the best epoch on held-out images; official: the last weights, all training images train",
        ),
    ]
    official_test: Annotated[
        Literal["test", "val"], Key("test", "what protocol=official reports on: test, or validation images")
    ]
    val_file: Annotated[str | None, Key(None, "text file of validation images, a name per line; null draws them")]
    train_transform: Annotated[
        Literal["plain", "random_crop", "resize_crop", "scale_crop"],
        Key("random_crop", "how a training image is brought to size; scale_crop for segmentation alone"),
    ]
    eval_transform: Annotated[
        Literal["squash", "center_crop", "squash_crop"] | None,
        Key(None, "how an image is brought to size in evaluation; null follows data.train_transform"),
    ]
    interpolation: Annotated[Literal["bilinear", "bicubic"], Key("bilinear", "between pixels, in crops and resizes")]
    crop_scale_min: Annotated[
        float, Key(0.22, "smallest area of random_crop, share of the image", low=0, high=1, open_low=True)
    ]
    flip: Annotated[bool, Key(True, "mirror half of the training images")]
    color_jitter: Annotated[float, Key(0.0, "brightness, contrast and saturation jitter, share", low=0, high=1)]
    hue_jitter: Annotated[float, Key(0.0, "hue jitter, share of the colour circle", low=0, high=0.5)]
    cache: Annotated[bool, Key(False, "keep decoded images in memory (uint8)")]


class Razor(TypedDict):
    """Beside these the section holds the library's ``WORDS``, which are read by ``RAZOR_OVERRIDES`` alone."""

    name: Annotated[str, Key(REQUIRED, "preset", file_names("razor"))]
    sparsity: Annotated[float, Key(0.9, "share of each saved activation that is pruned", low=0, high=1, open_high=True)]
    head_sparsity: Annotated[
        float | None, Key(None, "the same for the head; null is razor.sparsity", low=0, high=1, open_high=True)
    ]
    dense: Annotated[str | None, Key(None, "layers left dense: patterns of names, separated by commas")]
    forward: Annotated[Literal["dense", "pruned"], Key("dense", "ablation: prune the forward pass, too")]
    selection: Annotated[
        Literal["magnitude", "random"], Key("magnitude", "ablation: keep the largest, or as many at random")
    ]


class Method(TypedDict):
    name: Annotated[str, Key(REQUIRED, "which parameters train besides the head", file_names("method"))]
    bn_affine: Annotated[Literal["train", "frozen"], Key("train", "batch norm's scale and shift")]
    bn_stats: Annotated[
        Literal["batch", "frozen"], Key("batch", "batch norm's mean and variance: of the batch, or as pretrained")
    ]
    frozen_bits: Annotated[
        int | None,
        Key(None, "bits that frozen weights are stored in, by k-means; null is as they came", low=8, high=8),
    ]


class Optim(TypedDict):
    name: Annotated[str, Key(REQUIRED, "optimizer", file_names("optim"))]
    lr: Annotated[float, Key(REQUIRED, "peak learning rate", low=0, high=1e38, open_low=True)]
    weight_decay: Annotated[float, Key(0.0, "weight decay", low=0, high=1000)]
    momentum: Annotated[float, Key(0.9, "momentum of sgd", low=0, high=1, open_high=True)]
    head_lr_multiplier: Annotated[
        float, Key(1.0, "the head's learning rate, times optim.lr", low=0, high=1000, open_low=True)
    ]
    schedule: Annotated[Literal["cosine", "constant", "poly", "linear"], Key("cosine", "learning rate by step")]
    warmup_steps: Annotated[int, Key(0, "linear warm-up, optimizer steps", low=0, high=10**9)]
    label_smoothing: Annotated[float, Key(0.1, "label smoothing", low=0, high=1, open_high=True)]
    grad_clip: Annotated[float | None, Key(None, "largest gradient norm", low=0, high=10**6, open_low=True)]
    grad_clip_each: Annotated[
        float | None, Key(None, "largest norm of each parameter's gradient", low=0, high=10**6, open_low=True)
    ]
    state_bits: Annotated[
        int | None,
        Key(
            None,
            "bits that the optimizer's state is stored in, by bitsandbytes; null is the weights' type",
            low=8,
            high=8,
        ),
    ]


class Measure(TypedDict):
    mode: Annotated[
        Literal["none", "saved", "all"],
        Key("all", "memory columns: none, saved (in this process) or all (fresh processes, too)"),
    ]
    batch_size: Annotated[
        int | None, Key(None, "images in the measured step; null is trainer.batch_size", low=1, high=10**6)
    ]
    image_size: Annotated[
        int | None, Key(None, "its image side, pixels; null is data.image_size", low=MIN_IMAGE_SIZE, high=1024)
    ]
    repeats: Annotated[int, Key(3, "fresh processes per figure", low=1, high=100)]
    steps: Annotated[int, Key(5, "timed steps per process", low=1, high=1000)]


class Trainer(TypedDict):
    epochs: Annotated[int, Key(5, "passes over the training split", low=1, high=10**6)]
    steps: Annotated[int | None, Key(None, "optimizer steps; overrides trainer.epochs", low=1, high=10**9)]
    batch_size: Annotated[int, Key(16, "images per optimizer step, over all processes", low=1, high=MOST_IMAGES)]
    drop_last: Annotated[bool, Key(True, "leave images that do not fill the epoch's last batch out of it")]
    micro_batch: Annotated[
        int | None,
        Key(None, "images per forward (gradient accumulation); null is all", low=1, high=MOST_IMAGES),
    ]
    eval_batch_size: Annotated[int, Key(64, "images per forward in evaluation", low=1, high=MOST_IMAGES)]
    eval_every: Annotated[int, Key(1, "epochs between evaluations on the validation split", low=1, high=10**6)]
    precision: Annotated[
        Literal["float32", "bfloat16", "float16"],
        Key("float32", "forward in float32, or under autocast; float16 scales the loss"),
    ]
    channels_last: Annotated[bool, Key(False, "images and weights with channels last in memory")]
    compile: Annotated[bool, Key(False, "torch.compile the network that trains; needs a C++ compiler")]
    cuda_graph: Annotated[bool, Key(False, "capture the training step as CUDA graphs; one GPU, no recomputation")]
    release_gradients: Annotated[bool, Key(False, "step each parameter during backward, and free its gradient")]
    checkpointing: Annotated[
        Literal["none", "block", "stage", "selective"],
        Key("none", "recompute activations by block or stage; selective: by block, all but the outputs of products"),
    ]
    resume: Annotated[
        Literal["auto", "never"], Key("auto", "auto: go on with this configuration's run; never: start it over")
    ]
    save_every: Annotated[int, Key(500, "optimizer steps between checkpoints within an epoch", low=1, high=10**9)]
    keep: Annotated[int, Key(2, "newest checkpoints that stay, besides the best weights", low=1, high=1000)]
    nonfinite: Annotated[
        Literal["stop", "skip"], Key("stop", "a step with NaN or Inf: end the run, or leave the step out")
    ]
    deterministic: Annotated[bool, Key(False, "deterministic torch algorithms only")]
    device: Annotated[Literal["auto", "cpu", "cuda"], Key("auto", "device")]
    workers: Annotated[
        int | None,
        Key(
            None,
            "data worker processes; null is 0 on the CPU, on CUDA this process's share of the cores, at most 8",
            low=0,
            high=256,
        ),
    ]
    threads: Annotated[int | None, Key(None, "torch threads; null is torch's choice", low=1, high=1024)]
    progress: Annotated[bool, Key(True, "show a progress bar")]
    measure: Measure


class Paths(TypedDict):
    outputs: Annotated[str, Key("outputs", "folder of the runs")]
    data: Annotated[str, Key("data", "folder of the data sets")]
    pretrain: Annotated[str, Key("pretrain", "folder of the pretrained weights")]


class Config(TypedDict):
    """A valid configuration; ``razorlab.settings.validate`` makes it of what was composed."""

    seed: Annotated[int, Key(0, "seed of weights, order and augmentation", low=0, high=2**31)]
    task: Task
    model: Model
    data: Data
    razor: Razor
    method: Method
    optim: Optim
    trainer: Trainer
    paths: Paths


_WORDS = (
    Key(None, f"{word.meaning}; null is the preset's", word.choices, path=f"razor.{name}", optional=True)
    for name, word in WORDS.items()
)
_SECTIONS = list(Config.__annotations__)
KEYS = tuple(sorted((*keys_of(Config), *_WORDS), key=lambda key: _SECTIONS.index(key.path.partition(".")[0])))
