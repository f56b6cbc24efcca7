"""Every table's experiments: those of ``razorlab.recipes``, and the ones of the method's other claims.

The ablation: pruning backward alone (the method) beside pruning forward too, the largest beside as many at random, and
zero beside a guess for what is dropped, at sparsities from 0.8 to 0.995. All under the paper's preset, so that nothing
but the named rule differs.

Dense prediction: DeepLabV3 under the setting of the segmentation code that Back Razor's README names (VITA-Group),
VOC 2012 augmented, 513 px, batch 16, output stride 16, SGD at 0.01 with the backbone at a tenth of it, decayed
polynomially over 30,000 iterations, weight decay 1e-4, inputs of convolutions and batch norms pruned at 0.7. Pets takes
the same rules at its own size and length, the embedded scenes have few steps of Adam; those are ours.

Language: MiniLM (all-MiniLM-L6-v2, pretrained) on VADER's sentences, in every way to train it. And the setting of the
BERT code that Back Razor's README names, over the same sentences in place of RTE: bert-base-uncased, up to 512 tokens,
batch 32, ten epochs at 2e-5 falling linearly, 0.8 of what q, k, v, the attention's products and its output with its
norm keep.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from razorlab.recipes import Recipe, Row, recipes

ABLATION_SPARSITIES = (0.8, 0.9, 0.95, 0.97, 0.99, 0.995)
ABLATION_RULES: dict[str, tuple[str, dict[str, str]]] = {  # row: its label, and what differs
    "backward": ("backward pruned", {"fill": "zero"}),
    "guess": ("backward pruned, guesses", {"fill": "known"}),
    "forward": ("forward and backward pruned", {"fill": "zero", "forward": "pruned"}),
    "random": ("backward pruned at random", {"fill": "zero", "selection": "random"}),
}
DIGITS_TABLES = ("digits", "ablation")  # tables whose every row is on embedded digits
TABLES = ("table1", "table2", *DIGITS_TABLES, "segmentation", "text")

REAL_DATA = {"segmentation": ("voc", "pets"), "text": ("vader",)}  # of a table; the others: ``recipes.DATA``
SMOKE_DATA = {"segmentation": "scenes", "text": "vader"}  # the others: ``recipes.SMOKE_DATA``

SEGMENTATION_SPARSITY = 0.7
OURS = "ours"


@dataclass(frozen=True)
class SegmentationRecipe:
    """What the segmentation table sets for one data set: image side in pixels, batch, iterations, backbones, and the
    optimizer."""

    size: int
    batch: int
    steps: int
    models: tuple[str, ...] = ("mobilenetv2", "resnet50")
    optim: str = "sgd"


SEGMENTATION = {
    "voc": SegmentationRecipe(513, 16, 30_000),
    "pets": SegmentationRecipe(321, 16, 10_000),
    "scenes": SegmentationRecipe(96, 8, 300, ("efficientnet_lite0",), "adam"),
}
SEGMENTATION_ROWS = (
    Row("full", "full, dense", {"method": "full", "razor": "none"}),
    Row(
        "full_checkpointing",
        "full, checkpointing",
        {"method": "full", "razor": "none"},
        {"trainer": {"checkpointing": "block"}},
    ),
    *(
        Row(
            f"paper{round(100 * sparsity)}",
            f"full, Back Razor {sparsity:g} (paper)",
            {"method": "full", "razor": "paper"},
            {"razor": {"sparsity": sparsity, "norm": "pruned", "batch_norm": "pruned"}},
        )
        for sparsity in (SEGMENTATION_SPARSITY, 0.9)
    ),
    *(
        Row(
            f"compact{round(100 * sparsity)}",
            f"full, Back Razor {sparsity:g} (compact)",
            {"method": "full", "razor": "compact"},
            {"razor": {"sparsity": sparsity}},
        )
        for sparsity in (SEGMENTATION_SPARSITY, 0.9, 0.97)
    ),
)


def _row(name: str, label: str, method: str, preset: str = "none", **settings: Any) -> Row:
    return Row(name, label, {"method": method, "razor": preset}, settings)


TEXT_ROWS = (
    _row("minilm_last", "head alone", "last"),
    _row("minilm_full", "full, dense", "full"),
    _row("minilm_full_checkpointing", "full, checkpointing", "full", trainer={"checkpointing": "block"}),
    _row("minilm_lora", "LoRA", "lora"),
    _row("minilm_lora_checkpointing", "LoRA, checkpointing", "lora", trainer={"checkpointing": "block"}),
    *(
        _row(f"minilm_razor{round(100 * s)}", f"full, Back Razor {s:g}", "full", "compact", razor={"sparsity": s})
        for s in (0.9, 0.97, 0.99)
    ),
    _row("minilm_lora_razor90", "LoRA, Back Razor 0.9", "lora", "compact", razor={"sparsity": 0.9}),
)
TEXT_LR = {"last": 1e-2, "lora": 1e-3, "full": 5e-5}

# What the released BERT code leaves dense: embeddings, the feed-forward part of every layer, the pooler.
BERT_DENSE = "*.embeddings.*,*.intermediate.*,*.layer.*[0-9].output.*,*.pooler.*"
BERT_ROWS = (
    _row("bert_full", "BERT, full, dense", "full"),
    _row(
        "bert_paper80",
        "BERT, full, Back Razor 0.8 (paper)",
        "full",
        "paper",
        razor={"sparsity": 0.8, "dense": BERT_DENSE},
    ),
)


def experiments(table: str) -> list[Recipe]:
    """Return every experiment of one of ``TABLES``."""
    if table == "segmentation":
        cells = [(data, model) for data, recipe in SEGMENTATION.items() for model in recipe.models]
        return [_segmentation(data, model, _on(model, row)) for data, model in cells for row in SEGMENTATION_ROWS]
    if table == "text":
        return [_text(row) for row in TEXT_ROWS] + [_bert(row) for row in BERT_ROWS]
    return _ablation() if table == "ablation" else recipes(table)


def _ablation() -> list[Recipe]:
    rows = [Row("dense", "dense", {"method": "full", "razor": "none"})]
    for name, (label, razor) in ABLATION_RULES.items():
        for sparsity in ABLATION_SPARSITIES:
            settings = {"razor": {"sparsity": sparsity, **razor}}
            groups = {"method": "full", "razor": "paper"}
            rows.append(Row(f"{name}{round(1000 * sparsity)}", f"{label}, {sparsity:g}", groups, settings))
    return [_ablated(row) for row in rows]


def _ablated(row: Row) -> Recipe:
    """225 training digits, as in the table ``digits``."""
    settings: dict[str, Any] = {
        "method": {"bn_affine": "frozen", "bn_stats": "frozen"},
        "data": {"train_fraction": 0.25},
        "optim": {"lr": 3e-4, "label_smoothing": 0.1},
        "trainer": {"epochs": 8, "eval_every": 8, "measure": {"mode": "saved", "batch_size": 8, "image_size": 224}},
    }
    groups = {"model": "efficientnet_lite0", "data": "digits", "optim": "adam", **row.groups}
    return Recipe(f"ablation/{row.name}", "digits", row, groups, {**settings, **row.settings}, None, OURS)


def _on(model: str, row: Row) -> Row:
    return replace(row, name=f"{model}_{row.name}", label=f"{model}, {row.label}")


def _segmentation(data: str, model: str, row: Row) -> Recipe:
    recipe = SEGMENTATION[data]
    settings: dict[str, Any] = {
        "task": {"output_stride": 16},
        "data": {"image_size": recipe.size},
        "method": {"bn_affine": "train", "bn_stats": "batch"},
        "optim": {"lr": 1e-3, "head_lr_multiplier": 10.0, "momentum": 0.9, "weight_decay": 1e-4},
        "trainer": {"steps": recipe.steps, "batch_size": recipe.batch, "eval_batch_size": recipe.batch},
    }
    if data == "pets":
        settings["data"]["train_transform"] = "scale_crop"
    if data == "scenes":  # so few steps take Adam, and statistics that are not ImageNet's for longer than they last
        settings["task"]["bn_momentum"] = 0.1
        settings["optim"] |= {"lr": 5e-4, "head_lr_multiplier": 4.0, "weight_decay": 0.0}
        settings["trainer"] |= {"eval_every": 5, "measure": {"mode": "saved", "repeats": 1, "steps": 2}}
    settings["optim"] |= {"schedule": "poly", "label_smoothing": 0.0}
    for section, values in row.settings.items():
        settings[section] = settings.get(section, {}) | values
    groups = {"task": "segmentation", "model": model, "data": data, "optim": recipe.optim, **row.groups}
    origin = "the released segmentation command" if data == "voc" else OURS
    return Recipe(f"segmentation/{data}_{row.name}", data, row, groups, settings, None, origin)


def _text(row: Row) -> Recipe:
    """250 steps: half an epoch."""
    settings: dict[str, Any] = {
        "task": {"tokens": 64},
        "optim": {"lr": TEXT_LR[row.groups["method"]], "weight_decay": 0.0, "label_smoothing": 0.0},
        "trainer": {"steps": 250, "batch_size": 32, "eval_batch_size": 128},
    }
    return _of_texts("minilm", row, settings, OURS)


def _bert(row: Row) -> Recipe:
    settings: dict[str, Any] = {
        "model": {"name": "bert-base-uncased"},
        "task": {"tokens": 512},
        "optim": {"lr": 2e-5, "weight_decay": 0.0, "label_smoothing": 0.0, "schedule": "linear", "grad_clip": 1.0},
        "trainer": {"epochs": 10, "batch_size": 32, "eval_batch_size": 32},
    }
    return _of_texts("hf", row, settings, "the released BERT command, of RTE")


def _of_texts(model: str, row: Row, settings: dict[str, Any], origin: str) -> Recipe:
    for section, values in row.settings.items():
        settings[section] = settings.get(section, {}) | values
    groups = {"task": "text", "model": model, "data": "vader", "optim": "adamw", **row.groups}
    return Recipe(f"text/{row.name}", "vader", row, groups, settings, None, origin)
