"""From a folder of runs to one table row per run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from razorlab.errors import UserError, first_few
from razorlab.records import find_records, hashed_settings, read_record, task_of

PARTS = ("weight_bytes", "gradient_bytes", "optimizer_bytes", "peak_bytes")  # what a step holds; ``total_bytes``
MEMORY = (
    *("saved_bytes", "predicted_bytes", "official_bytes", *PARTS, "total_bytes"),
    *("process_peak_bytes", "step_seconds"),
)

if TYPE_CHECKING:
    from razorlab import schema


def row_label(config: schema.Config) -> str:
    """Return what tells one table row from another: method, razor with its sparsity, checkpointing, micro-batches, how
    the optimizer keeps its state and takes its step."""
    razor, trainer = config["razor"], config["trainer"]
    checkpointing, micro = trainer["checkpointing"], trainer.get("micro_batch")
    if razor["name"] == "none":
        parts = ["dense"] if checkpointing == "none" else []
    else:
        parts = [razor["name"]] if razor["name"] == "int8" else [f"{razor['name']} {razor['sparsity']:g}"]
    words: Mapping[str, Any] = razor  # the library's, too
    if words.get("fill") is not None:
        parts.append(f"fill={words['fill']}")
    if razor.get("forward", "dense") != "dense":
        parts.append("forward pruned")
    if razor.get("selection", "magnitude") != "magnitude":
        parts.append("at random")
    if checkpointing != "none":
        selective = checkpointing == "selective"
        parts.append("selective checkpointing by block" if selective else f"checkpointing by {checkpointing}")
    if micro and micro < trainer["batch_size"]:
        parts.append(f"micro-batches of {micro}")
    if trainer.get("release_gradients"):
        parts.append("released")
    if config.get("optim", {}).get("state_bits"):
        parts.append(f"{config['optim']['state_bits']}-bit state")
    return f"{config['method']['name']}, " + " + ".join(parts)


def load_runs(folder: Path) -> pd.DataFrame:
    """Return one row for each record below ``folder``.

    Columns: ``label, experiment, config_hash, seed, date, model, data, task, method, razor, sparsity, checkpointing,
    protocol, pretrained, image_size, batch_size, steps, measured_batch, measured_size``, accuracies in percent
    (``test_top1, test_top5, test_mean_iou, val_top1``), ``test_images``, ``saved_by_role`` and ``saved_by_layer``
    (name to bytes, or None), ``MEMORY`` in bytes and seconds. What a record does not have is NaN. Where an experiment
    was run with several configurations of one label, it says what differs; ``newest`` tells the runs of the latest.

    Raises:
        UserError: no record there, or a damaged one.
    """
    frame = pd.DataFrame([_checked_row(path) for path in find_records(folder)]).assign(newest=True)
    of_experiments = frame[frame["experiment"].notna()].sort_values("date")
    latest = of_experiments.groupby("experiment")["config_hash"].transform("last")
    frame.loc[of_experiments.index, "newest"] = of_experiments["config_hash"] == latest
    for _, group in of_experiments.groupby(["experiment", "label"]):
        settings = dict(zip(group["config_hash"], group["settings"], strict=True))
        differing = [key for key in dict.fromkeys(chain(*settings.values())) if _differ(key, settings.values())]
        for row in group.itertuples() if len(settings) > 1 else ():
            what = [f"{key}={json.dumps(row.settings.get(key))}".replace('"', "") for key in differing]
            frame.loc[row.Index, "label"] = f"{row.label} [{first_few(what, 3)}]"
    return frame.drop(columns="settings")


def _differ(key: str, settings: Iterable[Mapping[str, Any]]) -> bool:
    return len({json.dumps(one.get(key)) for one in settings}) > 1


def _checked_row(path: Path) -> dict[str, Any]:
    try:
        return _row(read_record(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is an incomplete record ({error!r}): remove it and run its row again") from error


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    config, memory = record["config"], record["memory"]
    return {
        "label": row_label(config),
        "settings": hashed_settings(config),
        "experiment": record["experiment"],
        "config_hash": record["config_hash"],
        "seed": record["seed"],
        "date": record["circumstances"]["date"],
        "model": config["model"]["name"],
        "data": config["data"]["name"],
        "task": task_of(config),
        "method": config["method"]["name"],
        "razor": config["razor"]["name"],
        "sparsity": config["razor"]["sparsity"],
        "checkpointing": config["trainer"]["checkpointing"],
        "protocol": config["data"].get("protocol"),
        "pretrained": config["model"].get("pretrained"),
        "image_size": config["data"].get("image_size"),
        "batch_size": config["trainer"].get("batch_size"),
        "steps": record.get("steps"),
        "measured_batch": memory.get("batch_size"),
        "measured_size": memory.get("image_size"),
        "test_top1": record["test"]["top1"],
        "test_top5": record["test"].get("top5", float("nan")),
        "test_mean_iou": record["test"].get("mean_iou", float("nan")),
        "test_images": record["test"].get("images"),
        "val_top1": record["val"]["top1"],
        "saved_by_role": memory.get("saved_by_role"),
        "saved_by_layer": memory.get("saved_by_layer"),
        **{name: memory.get(name, float("nan")) for name in MEMORY},
    }
