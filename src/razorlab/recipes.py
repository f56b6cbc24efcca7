"""The experiments of tables 1 and 2 and of the table on digits, in one place: what each row and data set sets.

``razorlab.composition`` hands them to Hydra, ``razorlab reproduce`` runs them and ``razorlab.tables.grid`` lays their
records out. ``razorlab.released`` holds the values and where each comes from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from razorlab.released import (
    CNN,
    CNN_SPARSITY,
    DATA,
    DIGITS_CNN,
    DIGITS_VIT,
    NOT_RELEASED,
    RELEASED,
    TINYTL,
    TINYTL_COMMANDS,
    VIT,
    CnnRecipe,
    Published,
    VitRecipe,
)

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
        model: the backbone whose recipes it takes.
    """

    name: str
    label: str
    groups: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    takes_sparsity: bool = False
    published: str | None = None
    model: str = "proxylessnas"


def _plain(name: str, label: str, method: str, published: str | None = None, **settings: Any) -> Row:
    return Row(name, label, {"method": method, "razor": "none"}, settings, published=published)


def _razored(name: str, label: str, razor: str, model: str = "proxylessnas") -> Row:
    return Row(name, label, {"method": "full", "razor": razor}, takes_sparsity=True, model=model)


def _of_another(model: str, label: str, *razors: str) -> Iterator[Row]:
    """A dense row of another backbone and its razored ones."""
    yield Row(f"{model}_full", f"full, dense ({label})", {"method": "full", "razor": "none"}, model=model)
    for razor in razors:
        name = {"compact": "razor", "paper": "paper"}[razor]
        yield _razored(f"{model}_{name}{{sparsity}}", f"full, Back Razor ({razor}, {label})", razor, model)


TABLE1_ROWS = (
    _plain("last", "head alone", "last", "FT-Last"),
    _plain("bias", "bias (TinyTL-B)", "bias", "TinyTL-B"),
    _plain("tinytl_l", "TinyTL-L", "tinytl_l", "TinyTL-L"),
    _plain("tinytl_lb", "TinyTL-L+B", "tinytl_lb", "TinyTL-L+B"),
    _plain("norm_last", "norm + head", "norm_last", "FT-Norm+Last"),
    _plain("full", "full, dense", "full", "FT-Full"),
    _razored("paper{sparsity}", "full, Back Razor (paper)", "paper"),
    _razored("razor{sparsity}", "full, Back Razor (compact)", "compact"),
    *_of_another("resnet18", "ResNet-18", "paper", "compact"),
    *_of_another("mobilenetv2", "MobileNetV2", "compact"),
    *_of_another("resnet50", "ResNet-50", "compact"),
)

# Dense images of 224 px whose step peaks no higher than compact's at batch 128, by `predict`; a test holds them.
MICRO_BATCH = {0.8: 17, 0.9: 17}

TABLE2_ROWS = (
    _plain("last", "head alone", "last"),
    _plain("bias", "bias (BitFit)", "bias"),
    _plain("full", "full, dense", "full"),
    Row("full_int8", "full, 8 bits (as Mesa)", {"method": "full", "razor": "int8"}),
    _plain("full_checkpointing", "full, checkpointing", "full", trainer={"checkpointing": "block"}),
    _plain("full_micro", "full, micro-batches", "full"),
    _razored("paper{sparsity}", "full, Back Razor (paper)", "paper"),
    _razored("compact{sparsity}", "full, Back Razor (compact)", "compact"),
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
class Recipe:
    """One experiment, or the recipe of a backbone and a data set.

    Args:
        name: ``table1/pets_full``.
        groups: the option of each group that it chooses.
        settings: the keys that it sets.
        published: its published figures, None where there are none.
        origin: where its settings come from.
    """

    name: str
    data: str
    row: Row
    groups: Mapping[str, str]
    settings: Mapping[str, Any]
    published: Published | None
    origin: str

    @property
    def about(self) -> str:
        """What it is, its published figures, and where its settings come from, in one line."""
        figure = "not published here"
        if self.published is not None:
            figure = (
                f"published: {self.published.accuracy[self.data]}%, {self.published.memory_mb:g} MB by formula, "
                f"batch 8 ({self.row.published}, TinyTL, arXiv 2007.11622, table 2, mean of 5 runs)"
            )
        return f"{self.row.label}; {figure}; settings: {self.origin}"


def recipes(table: str) -> list[Recipe]:
    """Return every experiment of ``table1`` or ``table2``, those on the embedded digits last, or of ``digits``."""
    if table == "digits":
        return [_digits(row) for row in DIGITS_ROWS]
    sets = (*DATA, SMOKE_DATA)
    if table == "table2":
        return [_table2(data, row) for data in sets for row in TABLE2_ROWS]
    assert table == "table1", table
    return [_table1(data, row) for data in sets for row in TABLE1_ROWS if _cnn(data, row) is not None]


def pairs() -> list[Recipe]:
    """Return the recipe of each backbone and data set, ``<model>/<data>``.

    It is what the row that prunes sets, of ``tinytl`` that of TinyTL-L+B, but for the method and the preset.
    """
    found = []
    for recipe in (*recipes("table1"), *recipes("table2")):
        if recipe.data == SMOKE_DATA:
            continue
        model, groups = recipe.groups["model"], {"optim": recipe.groups["optim"]}
        if recipe.row.name != "tinytl_lb" and not (recipe.row.takes_sparsity and recipe.groups["razor"] == "compact"):
            continue
        found.append(replace(recipe, name=f"{model}/{recipe.data}", groups=groups))
    return found


def _cnn(data: str, row: Row) -> CnnRecipe | None:
    """What ``row`` begins with; None where its backbone has no recipe for ``data``."""
    if data == SMOKE_DATA:
        return DIGITS_CNN if row.model == "proxylessnas" else None
    return CNN[row.model].get(data)


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
    return _recipe("digits", None, row, "efficientnet_lite0", "adam", 0.0, settings, "ours")


def _table1(data: str, row: Row) -> Recipe:
    recipe = _cnn(data, row)
    assert recipe is not None, (data, row.name)
    smoke = data == SMOKE_DATA
    settings: dict[str, Any] = {
        "model": {"head_init": "uniform"},
        "method": {"frozen_bits": 8 if row.model == "proxylessnas" else None},  # as released
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
    # ProxylessNAS's weights need a network to fetch; Lite0's, a near twin, come with a package.
    model, origin = "efficientnet_lite0" if smoke else row.model, NOT_RELEASED
    if row.takes_sparsity:
        origin = recipe.origin
        settings["method"] |= {"bn_affine": recipe.bn_affine, "bn_stats": recipe.bn_stats}
        settings["razor"] = {"sparsity": CNN_SPARSITY}
    elif row.published and row.published.startswith("TinyTL") and not smoke:
        model, origin = "tinytl", "TinyTL's released L+B command"
        settings["optim"] |= dict(zip(("lr", "label_smoothing"), TINYTL_COMMANDS[data], strict=True))
    elif row.groups["method"] == "full" and recipe.dense is not None:
        dense, origin = recipe.dense, recipe.dense.origin
        settings["optim"]["lr"] = dense.lr
        settings["method"] |= {"bn_affine": dense.bn_affine, "bn_stats": dense.bn_stats}
    return _recipe("table1", data, row, model, "adam", CNN_SPARSITY, settings, "ours: a smoke run" if smoke else origin)


def _table2(data: str, row: Row) -> Recipe:
    smoke = data == SMOKE_DATA
    recipe: VitRecipe = DIGITS_VIT if smoke else VIT[data]
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
    origin = "ours: a smoke run" if smoke else RELEASED if row.takes_sparsity else NOT_RELEASED
    return _recipe("table2", data, row, "timm" if smoke else "vit_b16", "sgd", recipe.sparsity, settings, origin)


def _recipe(
    table: str,
    data: str | None,
    row: Row,
    model: str,
    optim: str,
    sparsity: float,
    settings: dict[str, Any],
    origin: str,
) -> Recipe:
    for section, values in row.settings.items():
        settings[section] = settings.get(section, {}) | values
    name = row.name.format(sparsity=round(100 * sparsity))
    name = name if data is None else f"{data}_{name}"
    data = data or SMOKE_DATA
    groups = {"model": model, "data": data, "optim": optim, **row.groups}
    published = TINYTL.get(row.published) if row.published and data != SMOKE_DATA else None
    return Recipe(f"{table}/{name}", data, row, groups, settings, published, origin)
