"""Every table's experiments: those of ``transfer.recipes``, and the ones of the method's other claims, which run on
embedded data.

The ablation: pruning backward alone (the method) beside pruning forward too, the largest beside as many at random, and
zero beside a guess for what is dropped, at sparsities from 0.8 to 0.995. All under the paper's preset, so that nothing
but the named rule differs.
"""

from __future__ import annotations

from typing import Any

from transfer.recipes import Recipe, Row, recipes

ABLATION_SPARSITIES = (0.8, 0.9, 0.95, 0.97, 0.99, 0.995)
ABLATION_RULES: dict[str, tuple[str, dict[str, str]]] = {  # row: its label, and what differs
    "backward": ("backward pruned", {"fill": "zero"}),
    "guess": ("backward pruned, guesses", {"fill": "known"}),
    "forward": ("forward and backward pruned", {"fill": "zero", "forward": "pruned"}),
    "random": ("backward pruned at random", {"fill": "zero", "selection": "random"}),
}
DIGITS_TABLES = ("digits", "ablation")  # tables whose every row is on embedded digits
TABLES = ("table1", "table2", *DIGITS_TABLES)


def experiments(table: str) -> list[Recipe]:
    """Return every experiment of one of ``TABLES``."""
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
    return Recipe(f"ablation/{row.name}", "digits", row, groups, settings | row.settings, None)
