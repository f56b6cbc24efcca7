"""From one row per run to one row per configuration: mean and spread over seeds, ratios to the dense row."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

METRICS = {  # column of a run: the table's, and the scale to what is shown
    "test_top1": ("accuracy", 1.0),
    "test_mean_iou": ("mean_iou", 1.0),
    "saved_bytes": ("saved_mb", 1e-6),
    "weight_bytes": ("weights_mb", 1e-6),
    "gradient_bytes": ("gradients_mb", 1e-6),
    "optimizer_bytes": ("optimizer_mb", 1e-6),
    "peak_bytes": ("peak_mb", 1e-6),
    "total_bytes": ("total_mb", 1e-6),
    "step_seconds": ("step_s", 1.0),
}
METHOD_ORDER = ("last", "bias", "lora", "tinytl_l", "tinytl_lb", "norm_last", "full")


def summarise(runs: pd.DataFrame, expected: Sequence[str] = ()) -> pd.DataFrame:
    """Return one row for each configuration in ``runs``.

    Columns: ``method`` (the label), ``config_hash``, ``seeds``, ``razor``, ``test_images`` (that a point is scored
    on), and for each of ``accuracy``, ``mean_iou`` (percent; where pixels are scored), ``saved_mb``,
    ``weights_mb``, ``gradients_mb``, ``optimizer_mb``, ``peak_mb``, the sum of these four ``total_mb`` (1e6 bytes) and
    ``step_s`` the mean over seeds, ``_std`` (sample deviation, NaN for one seed) and ``_ratio`` (value over that of the
    dense row: method full, no razor, no checkpointing, the ordinary step).

    Args:
        runs: as ``load_runs`` returns them.
        expected: experiment names that must have a row; one without a record gets an empty row with 0 seeds.
    """
    metrics = dict(METRICS)
    if not runs["test_mean_iou"].notna().any():
        del metrics["test_mean_iou"]
    rows = []
    for _, group in runs.groupby(["experiment", "config_hash"], sort=False, dropna=False):
        first = group.iloc[0]
        row = {
            "method": first["label"],
            "config_hash": first["config_hash"],
            "seeds": len(group),
            "razor": first["razor"],
            "test_images": group["test_images"].iloc[0],
            "_order": _order(first),
        }
        for metric, (name, scale) in metrics.items():
            values = group[metric].astype(float) * scale
            row[name], row[f"{name}_std"] = values.mean(), values.std()
        rows.append(row)
    missing = [name for name in expected if name not in set(runs["experiment"])]
    rows += [{"method": name.rpartition("/")[2], "config_hash": None, "seeds": 0, "_order": (9,)} for name in missing]
    table = pd.DataFrame(sorted(rows, key=lambda row: row["_order"]))
    dense = _dense_row(runs)
    for name, _ in metrics.values():
        base = table.loc[table["config_hash"].eq(dense), name].iloc[0] if dense is not None else float("nan")
        table[f"{name}_ratio"] = table[name] / base
    return table.drop(columns="_order")


def _order(row: pd.Series) -> tuple:
    method = METHOD_ORDER.index(row["method"]) if row["method"] in METHOD_ORDER else len(METHOD_ORDER)
    return (method, row["razor"] != "none", row["razor"], row["sparsity"], row["checkpointing"] != "none")


def _dense_row(runs: pd.DataFrame) -> str | None:
    """Hash of the configuration that ratios refer to."""
    plain = runs[runs["newest"] & runs["label"].str.fullmatch(r"full, dense( \[.*\])?")]
    return plain.iloc[0]["config_hash"] if len(plain) else None
