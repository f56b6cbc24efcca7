"""What a run leaves to look at: log.txt, metrics.csv and TensorBoard events."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from transfer.settings import flatten

LOGGER = logging.getLogger("transfer")
COLUMNS = ("epoch", "step", "lr", "train_loss", "train_top1", "images_per_second", "val_loss", "val_top1", "val_top5")


class Monitor:
    """Writes a run's course into its folder. A context manager; a resumed run appends.

    Args:
        folder: the run's folder, which exists.
        first_step: steps already done; older events beyond it are dropped by TensorBoard, older CSV rows here.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self.folder = folder
        self.handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        LOGGER.setLevel(logging.INFO)
        LOGGER.addHandler(self.handler)
        self.metrics = folder / "metrics.csv"
        self._keep_rows_until(first_step)
        self.writer = SummaryWriter(str(folder), purge_step=first_step if first_step else None)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()
        LOGGER.removeHandler(self.handler)
        self.handler.close()

    def _keep_rows_until(self, step: int) -> None:
        rows = []
        if step and self.metrics.is_file():
            with self.metrics.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        with self.metrics.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)

    def scalar(self, name: str, value: float, step: int) -> None:
        """One point of a TensorBoard curve."""
        self.writer.add_scalar(name, value, step)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Append one row of ``COLUMNS`` to metrics.csv and its curves to TensorBoard."""
        with self.metrics.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
        for name in COLUMNS[3:]:
            if row.get(name) is not None:
                part, _, what = name.partition("_")
                self.scalar(f"{part}/{what}" if part in ("train", "val") else f"speed/{name}", row[name], row["step"])

    def figure(self, name: str, figure: Figure | None, step: int) -> None:
        """One picture; None is passed over."""
        if figure is not None:
            self.writer.add_figure(name, figure, step)

    def finish(self, config: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Write the hyper-parameters with the final metrics, in this run's own event file."""
        values = {
            key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in flatten(config)
        }
        for summary in hparams(values, dict(metrics)):
            self.writer.file_writer.add_summary(summary)
        for name, value in metrics.items():
            self.scalar(name, value, 0)
