"""The experiments of tables 1 and 2 and of the table on digits, in one place: what each row and data set sets, and
what was published.

``scripts/write_recipes.py`` writes configs/experiment/ from this module, ``scripts/reproduce.py`` runs those files and
``transfer.tables.grid`` lays their records out. Settings are those of the commands released with Back Razor
(VITA-Group/BackRazor_Neurips22); published figures are from table 2 of TinyTL (Cai et al., NeurIPS 2020, arXiv
2007.11622). The paper's own result tables could not be checked, so no figure of them is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

DATA = ("flowers", "cars", "cub200", "food101", "pets", "aircraft", "cifar10", "cifar100")
SMOKE_DATA = "digits"
SMOKE_SPLITS = {"train_fraction": 0.25, "val_fraction": 0.05, "test_fraction": 0.1}


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Args:
        name: last part of the experiment's name; ``{sparsity}`` stands for the data set's, in percent.
        label: how the table names it.
        groups: ``method``, ``razor`` and so on to choose.
        settings: further keys.
        takes_sparsity: whether the data set's sparsity applies.
        published: the row of ``TINYTL`` that stands beside it.
    """

    name: str
    label: str
    groups: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    takes_sparsity: bool = False
    published: str | None = None


@dataclass(frozen=True)
class Published:
    """A published row: memory by its authors' formula in MB (1e6 bytes) at batch 8, accuracy in percent by data set."""

    memory_mb: float
    accuracy: Mapping[str, float]


def _tinytl(memory_mb: float, *accuracy: float) -> Published:
    return Published(memory_mb, dict(zip(DATA, accuracy, strict=True)))


TINYTL = {
    "FT-Last": _tinytl(31, 90.1, 50.9, 73.3, 68.7, 91.3, 44.9, 85.9, 68.8),
    "TinyTL-B": _tinytl(32, 93.5, 73.4, 75.3, 75.5, 92.1, 63.2, 93.7, 78.8),
    "TinyTL-L": _tinytl(37, 95.3, 84.2, 76.8, 79.2, 91.7, 76.4, 96.1, 80.9),
    "TinyTL-L+B": _tinytl(37, 95.5, 85.0, 77.1, 79.7, 91.8, 75.4, 95.9, 81.4),
    "FT-Norm+Last": _tinytl(192, 94.3, 77.9, 76.3, 77.0, 92.2, 68.1, 94.8, 80.2),
    "FT-Full": _tinytl(391, 96.8, 90.2, 81.0, 84.6, 93.0, 86.0, 97.1, 84.1),
}


def _plain(name: str, label: str, method: str, published: str | None = None, **settings: Any) -> Row:
    return Row(name, label, {"method": method, "razor": "none"}, settings, published=published)


TABLE1_ROWS = (
    _plain("last", "head alone", "last", "FT-Last"),
    _plain("bias", "bias (TinyTL-B)", "bias", "TinyTL-B"),
    _plain("tinytl_l", "TinyTL-L", "tinytl_l", "TinyTL-L"),
    _plain("tinytl_lb", "TinyTL-L+B", "tinytl_lb", "TinyTL-L+B"),
    _plain("norm_last", "norm + head", "norm_last", "FT-Norm+Last"),
    _plain("full", "full, dense", "full", "FT-Full"),
    Row("razor{sparsity}", "full, Back Razor", {"method": "full", "razor": "compact"}, takes_sparsity=True),
)

# Dense images of 224 px whose step peaks no higher than compact's at batch 128, by `predict`; a test holds them.
MICRO_BATCH = {0.8: 16, 0.9: 14}

TABLE2_ROWS = (
    _plain("last", "head alone", "last"),
    _plain("bias", "bias (BitFit)", "bias"),
    _plain("full", "full, dense", "full"),
    Row("full_int8", "full, 8 bits (as Mesa)", {"method": "full", "razor": "int8"}),
    _plain("full_checkpointing", "full, checkpointing", "full", trainer={"checkpointing": "block"}),
    _plain("full_micro", "full, micro-batches", "full"),
    Row("paper{sparsity}", "full, Back Razor (paper)", {"method": "full", "razor": "paper"}, takes_sparsity=True),
    Row("compact{sparsity}", "full, Back Razor (compact)", {"method": "full", "razor": "compact"}, takes_sparsity=True),
)


DIGITS_SPARSITIES = (0.8, 0.9, 0.95, 0.97)
DIGITS_ROWS = (
    _plain("last", "head alone", "last"),
    _plain("bias", "bias + head", "bias"),
    _plain("norm_last", "norm + head", "norm_last"),
    _plain("full", "full, dense", "full"),
    _plain("full_checkpointing", "full, checkpointing", "full", trainer={"checkpointing": "block"}),
    Row("full_int8", "full, 8 bits (as Mesa)", {"method": "full", "razor": "int8"}),
    *(
        Row(
            f"razor{round(100 * sparsity)}",
            f"full, Back Razor {sparsity:g}",
            {"method": "full", "razor": "compact"},
            {"razor": {"sparsity": sparsity}},
        )
        for sparsity in DIGITS_SPARSITIES
    ),
)


# Of 1e-3, 3e-3 and 1e-2 the best on validation, seed 0; full: as in experiment/scarce.
DIGITS_LR = {"last": 3e-3, "bias": 1e-2, "norm_last": 1e-2, "full": 3e-4}


@dataclass(frozen=True)
class CnnRecipe:
    """What table 1 sets for one data set; the batch norm columns are those of the pruned row."""

    lr: float
    label_smoothing: float
    jitter: bool
    bn_affine: str
    bn_stats: str


TABLE1 = {
    "cifar10": CnnRecipe(3e-5, 0.1, False, "frozen", "frozen"),
    "cifar100": CnnRecipe(3e-5, 0.1, False, "frozen", "frozen"),
    "pets": CnnRecipe(3e-5, 0.3, False, "frozen", "frozen"),
    "food101": CnnRecipe(3e-5, 0.1, False, "frozen", "batch"),
    "cub200": CnnRecipe(1e-4, 0.7, False, "frozen", "batch"),
    "aircraft": CnnRecipe(3e-4, 0.3, True, "frozen", "batch"),
    "cars": CnnRecipe(3e-4, 0.7, True, "train", "batch"),
    "flowers": CnnRecipe(1e-4, 0.7, False, "train", "batch"),
    "digits": CnnRecipe(3e-4, 0.1, False, "frozen", "frozen"),
}
TABLE1_SPARSITY = 0.9


@dataclass(frozen=True)
class VitRecipe:
    """What table 2 sets for one data set."""

    sparsity: float
    lr: float
    steps: int
    co_tuning: bool = False
    head_lr_multiplier: float = 1.0


TABLE2 = {
    "cifar10": VitRecipe(0.9, 0.01, 20000),
    "cifar100": VitRecipe(0.9, 0.01, 20000),
    "cub200": VitRecipe(0.9, 0.01, 6000),
    "pets": VitRecipe(0.9, 0.001, 20000, co_tuning=True),
    "aircraft": VitRecipe(0.8, 0.03, 6000, co_tuning=True, head_lr_multiplier=10.0),
    "flowers": VitRecipe(0.8, 0.03, 2000),
    "food101": VitRecipe(0.8, 0.01, 30000),
    "cars": VitRecipe(0.8, 0.1, 16000),
    "digits": VitRecipe(0.9, 0.01, 20),
}


@dataclass(frozen=True)
class Recipe:
    """One experiment: configs/experiment/<name>.yaml.

    Args:
        name: ``table1/pets_full``.
        groups: the defaults list of its file.
        settings: the keys that it sets.
        published: its published figures, None where there are none.
    """

    name: str
    data: str
    row: Row
    groups: Mapping[str, str]
    settings: Mapping[str, Any]
    published: Published | None


def recipes(table: str) -> list[Recipe]:
    """Return every experiment of ``table1`` or ``table2``, those on the embedded digits last, or of ``digits``."""
    if table == "digits":
        return [_digits(row) for row in DIGITS_ROWS]
    make, rows = {"table1": (_table1, TABLE1_ROWS), "table2": (_table2, TABLE2_ROWS)}[table]
    return [make(data, row) for data in (*DATA, SMOKE_DATA) for row in rows]


def pairs() -> list[Recipe]:
    """Return the recipe of each backbone and data set, ``<model>/<data>``: what the row that prunes sets, but for the
    method and the preset."""
    found = []
    for model, table in (("proxylessnas", "table1"), ("vit_b16", "table2")):
        for recipe in recipes(table):
            if recipe.data != SMOKE_DATA and recipe.row.takes_sparsity and recipe.groups["razor"] == "compact":
                name, groups = f"{model}/{recipe.data}", {"optim": recipe.groups["optim"]}
                found.append(replace(recipe, name=name, groups=groups))
    return found


def _digits(row: Row) -> Recipe:
    """225 training digits: few enough that the head alone falls behind."""
    parts = row.groups["method"] in ("bias", "norm_last")  # here batch norm's scale and shift are what trains
    settings: dict[str, Any] = {
        "method": {"bn_affine": "train" if parts else "frozen", "bn_stats": "frozen"},
        "data": {"image_size": 64, "train_fraction": 0.25},
        "optim": {"lr": DIGITS_LR[row.groups["method"]], "label_smoothing": 0.1},
        "trainer": {"epochs": 8, "eval_every": 8, "batch_size": 16},
    }
    settings["trainer"]["measure"] = {"mode": "saved", "batch_size": 8, "image_size": 224, "repeats": 3, "steps": 5}
    return _recipe("digits", None, row, "efficientnet_lite0", "adam", 0.0, settings)


def _table1(data: str, row: Row) -> Recipe:
    recipe = TABLE1[data]
    smoke = data == SMOKE_DATA
    settings: dict[str, Any] = {
        "model": {"head_init": "uniform"},
        "method": {"frozen_bits": 8},
        "data": {"image_size": 64, **SMOKE_SPLITS}
        if smoke
        else {"image_size": 224, "train_transform": "random_crop", "crop_scale_min": 0.22, "flip": True},
        "optim": {"lr": recipe.lr, "weight_decay": 0.0, "label_smoothing": recipe.label_smoothing},
        "trainer": {"epochs": 50, "batch_size": 8, "drop_last": False, "eval_batch_size": 100},
    }
    if smoke:
        settings["trainer"] |= {
            "epochs": 1,
            "measure": {"batch_size": 8, "image_size": 224, "repeats": 1, "steps": 2},
        }
    if recipe.jitter:
        settings["data"] |= {"color_jitter": 0.4, "hue_jitter": 0.1}
    if row.takes_sparsity:
        settings["method"] |= {"bn_affine": recipe.bn_affine, "bn_stats": recipe.bn_stats}
        settings["razor"] = {"sparsity": TABLE1_SPARSITY}
    # ProxylessNAS's weights need a network to fetch; Lite0's, a near twin, come with a package.
    model = "efficientnet_lite0" if smoke else "proxylessnas"
    return _recipe("table1", data, row, model, "adam", TABLE1_SPARSITY, settings)


def _table2(data: str, row: Row) -> Recipe:
    recipe = TABLE2[data]
    smoke = data == SMOKE_DATA
    settings: dict[str, Any] = {
        "data": {"image_size": 224},
        "optim": {"lr": recipe.lr, "weight_decay": 0.0, "momentum": 0.9, "label_smoothing": 0.0},
        "trainer": {"steps": recipe.steps, "batch_size": 128, "drop_last": False},
    }
    settings["optim"] |= {"head_lr_multiplier": recipe.head_lr_multiplier, "warmup_steps": 500, "grad_clip": 1.0}
    if smoke:
        # No package ships weights of a vision transformer: a small one from random weights walks the same road.
        settings["model"] = {"name": "vit_tiny_patch16_224.augreg_in21k", "pretrained": False}
        settings["model"] |= {"pos_drop_rate": 0.1, "mlp_drop_rate": 0.1}
        settings["optim"] |= {"warmup_steps": 5}
        settings["data"] |= {"image_size": 128, **SMOKE_SPLITS}
        settings["trainer"] |= {"batch_size": 8, "measure": {"repeats": 1, "steps": 2}}
    elif recipe.co_tuning:
        settings["data"] |= {"train_transform": "resize_crop", "crop_scale_min": 0.08, "flip": True}
    else:
        settings["data"] |= {"train_transform": "random_crop", "crop_scale_min": 0.05, "flip": False}
        settings["data"] |= {"eval_transform": "squash"}
    if data == "pets":  # 2,940 and 740 images, the second of which the released run reports on
        settings["data"] |= {"val_fraction": 0.201, "official_test": "val"}
    if row.name == "full_micro":
        settings["trainer"]["micro_batch"] = 1 if smoke else MICRO_BATCH[recipe.sparsity]
    if row.takes_sparsity:
        settings["razor"] = {"sparsity": recipe.sparsity}
    return _recipe("table2", data, row, "timm" if smoke else "vit_b16", "sgd", recipe.sparsity, settings)


def _recipe(
    table: str, data: str | None, row: Row, model: str, optim: str, sparsity: float, settings: dict[str, Any]
) -> Recipe:
    for section, values in row.settings.items():
        settings[section] = settings.get(section, {}) | values
    name = row.name.format(sparsity=round(100 * sparsity))
    name = name if data is None else f"{data}_{name}"
    data = data or SMOKE_DATA
    groups = {"model": model, "data": data, "optim": optim, **row.groups}
    published = TINYTL.get(row.published) if row.published and data != SMOKE_DATA else None
    return Recipe(f"{table}/{name}", data, row, groups, settings, published)
