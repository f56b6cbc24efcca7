"""The cells of table 3: the memory of one training step, for each backbone, preset and sparsity. No data is needed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

import backrazor as br
from razorlab import schema
from razorlab.errors import UserError
from razorlab.files import atomic_write_text
from razorlab.official import official_memory
from razorlab.records import circumstances, read_record, write_record
from razorlab.settings import changed
from razorlab.training.costs import build_step, gpu_circumstances
from razorlab.training.network import assemble

CLASSES = 100
MODELS = {  # batch size at which the table is measured
    "efficientnet_lite0": 8,
    "mobilenetv2": 8,
    "proxylessnas": 8,
    "resnet18": 8,
    "resnet50": 8,
    "vit_b16": 4,
}
SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.97, 0.99)
PRESETS = ("paper", "compact")
IMAGE_SIZE = 224
SMOKE = {"models": ("efficientnet_lite0", "resnet18"), "sparsities": (0.0, 0.9, 0.97), "image_size": 96}
BATCHES = (1, 2, 4, 8, 16, 32)
BATCH_SPARSITY = 0.9  # of the figure against batch size


@dataclass(frozen=True)
class Cell:
    """One cell; ``preset`` is ``dense`` (the plain network), ``paper`` or ``compact``. Callable: builds its step."""

    model: str
    preset: str
    sparsity: float
    batch_size: int
    image_size: int

    @property
    def name(self) -> str:
        """Its file's name without the ending."""
        return f"{self.model}-{self.preset}-{self.sparsity:g}-batch{self.batch_size}-{self.image_size}px"

    def columns(self) -> dict[str, Any]:
        """What tells it from the others."""
        return dataclasses.asdict(self)

    def config(self) -> schema.Config:
        """The cell as a configuration: everything but batch norm trains, which stays frozen; weights are random."""
        transformer = self.model.startswith("vit")
        return changed(
            task={"name": "classification"},
            model={"name": self.model, "pretrained": False, "drop_rate": 0.1, "head_init": "linear"},
            data={"name": "none", "image_size": self.image_size},
            method={"name": "full", "bn_affine": "frozen", "bn_stats": "frozen"},
            razor={"name": "none" if self.preset == "dense" else self.preset, "sparsity": self.sparsity},
            optim={"name": "sgd" if transformer else "adam", "lr": 1e-3, "label_smoothing": 0.0},
        )

    def network(self) -> nn.Module:
        """The network as it trains."""
        torch.manual_seed(0)
        return assemble(self.config(), CLASSES).model

    def __call__(self) -> br.memory.Step:
        return build_step(self.config(), CLASSES, self.batch_size, self.image_size)


def grid(models: Sequence[str] | None, smoke: dict[str, Any] | None) -> list[Cell]:
    """Return the cells, each model's dense one first.

    Raises:
        UserError: an unknown model.
    """
    chosen = tuple(models or (smoke["models"] if smoke else MODELS))
    for name in chosen:
        if name not in MODELS:
            raise UserError.value("--models", name, "|".join(MODELS))
    sparsities = smoke["sparsities"] if smoke else SPARSITIES
    size = smoke["image_size"] if smoke else IMAGE_SIZE
    found = []
    for name in chosen:
        size_of = IMAGE_SIZE if name.startswith("vit") else size
        rows = [("dense", 0.0), *((preset, sparsity) for preset in PRESETS for sparsity in sparsities)]
        found += [Cell(name, preset, sparsity, MODELS[name], size_of) for preset, sparsity in rows]
    return found


def load(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """Return what is known of ``cell``; None where it was not run.

    Raises:
        UserError: its file is damaged.
    """
    path = folder / f"{cell.name}.json"
    return read_record(path) if path.is_file() else None


def has_peak(cell: Cell, folder: Path) -> bool:
    """Whether the peak was measured."""
    return (load(cell, folder) or {}).get("peak_bytes") is not None


def without_peak(cell: Cell, folder: Path, keep: bool = True) -> dict[str, Any]:
    """Fill the columns that need no fresh process: predicted, saved, official formula; bytes."""
    model = cell.network()
    shape: dict[str, Any] = {"input_size": (3, cell.image_size, cell.image_size), "batch_size": cell.batch_size}
    predicted = br.memory.predict(model, **shape)
    # The formula has no word for sparsity 0 with an index; it is asked at the sparsity, as the released commands do.
    official = official_memory(model, **shape)
    images = torch.randn(cell.batch_size, 3, cell.image_size, cell.image_size)
    labels = torch.randint(CLASSES, (cell.batch_size,))
    with br.memory.ledger(model) as ledger:
        loss = F.cross_entropy(model(images), labels)
    del loss
    record = {
        **cell.columns(),
        "official_bytes": round(official.total_bytes),
        "predicted_saved_bytes": predicted.saved_bytes,
        "predicted_peak_bytes": predicted.peak_bytes,
        "saved_bytes": ledger.total_bytes,
        "saved_by_role": ledger.by_role(),
        "circumstances": circumstances("cpu", torch.get_num_threads()),
    }
    if keep:
        _write(cell, folder, record)
    return record


def add_peak(cell: Cell, folder: Path, repeats: int = 1) -> dict[str, Any]:
    """Fill every column; the peak is measured in a fresh process."""
    record = load(cell, folder) or without_peak(cell, folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured = br.memory.measure_step(cell, repeats=repeats, what=("peak",))
    record |= {
        "peak_bytes": measured.peak_bytes,
        "process_peak_bytes": measured.process_peak_bytes,
        "peak_samples": list(measured.peak_samples),
        "circumstances": circumstances(device, torch.get_num_threads(), gpu=gpu_circumstances(device)),
    }
    _write(cell, folder, record)
    return record


def _write(cell: Cell, folder: Path, record: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder / f"{cell.name}.json", {key: value for key, value in record.items() if key != "schema"})


def predict_batches(models: Sequence[str], image_size: int, folder: Path) -> pd.DataFrame:
    """Return predicted peak and saved memory by batch size: dense, and the presets at sparsity 0.9; kept in a file."""
    path = folder / "batches.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    for name in models:
        size = IMAGE_SIZE if name.startswith("vit") else image_size
        for preset in ("dense", *PRESETS):
            cells = [Cell(name, preset, BATCH_SPARSITY if preset != "dense" else 0.0, batch, size) for batch in BATCHES]
            if all(cell.name in known for cell in cells):
                continue
            model = cells[0].network()
            for cell in cells:
                predicted = br.memory.predict(model, input_size=(3, size, size), batch_size=cell.batch_size)
                known[cell.name] = {
                    **cell.columns(),
                    "predicted_peak_mb": predicted.peak_bytes * 1e-6,
                    "saved_mb": predicted.saved_bytes * 1e-6,
                }
            atomic_write_text(path, json.dumps(known, indent=1))
    wanted = {f"{name}" for name in models}
    return pd.DataFrame([row for row in known.values() if row["model"] in wanted])
