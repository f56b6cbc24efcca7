"""What a run leaves to look at: log.txt, metrics.csv and TensorBoard events."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from razorlab import schema
from razorlab.files import atomic_write_text
from razorlab.settings import flatten

LOGGER = logging.getLogger("razorlab")
COLUMNS = (
    *("epoch", "step", "lr", "train_loss", "train_top1", "images_per_second"),
    *("val_loss", "val_top1", "val_top5", "val_mean_iou"),
)


class _LogFile(logging.FileHandler):
    """A log file that does not swallow what stops it from being written, such as a full disk."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise  # the standard library calls this inside its except block


class SilentMonitor:
    """Stands for ``Monitor`` in every process but the main one: takes anything, writes nothing."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class Monitor:
    """Writes a run's course into its folder. A context manager; a resumed run appends.

    Args:
        folder: the run's folder, which exists.
        first_step, first_epoch: steps and epochs already done; what an earlier process wrote beyond them is dropped,
            events by TensorBoard, rows here.
    """

    def __init__(self, folder: Path, first_step: int, first_epoch: int) -> None:
        self.folder = folder
        self.handler = _LogFile(folder / "log.txt", encoding="utf-8")
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        LOGGER.setLevel(logging.INFO)
        LOGGER.addHandler(self.handler)
        self.metrics = folder / "metrics.csv"
        self._keep_rows_until(first_epoch)
        self.writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()
        LOGGER.removeHandler(self.handler)
        self.handler.close()

    def _keep_rows_until(self, epoch: int) -> None:
        rows: list[dict[str, str]] = []
        if epoch and self.metrics.is_file():
            with self.metrics.open(newline="") as file:
                whole = [line for line in file if line.endswith("\n")]  # a process that died may have left half a line
            rows = [row for row in csv.DictReader(whole) if int(row["epoch"]) <= epoch]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        atomic_write_text(self.metrics, text.getvalue())

    def scalar(self, name: str, value: float, step: int) -> None:
        """One point of a TensorBoard curve."""
        self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Bring every curve's points to the file: TensorBoard's writer keeps them for minutes."""
        self.writer.flush()

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Append one row of ``COLUMNS`` to metrics.csv and its curves to TensorBoard."""
        with self.metrics.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
            file.flush()
            os.fsync(file.fileno())
        for name in COLUMNS[3:]:
            if row.get(name) is not None:
                part, _, what = name.partition("_")
                self.scalar(f"{part}/{what}" if part in ("train", "val") else f"speed/{name}", row[name], row["step"])

    def figure(self, name: str, figure: Figure | None, step: int) -> None:
        """One picture; None is passed over."""
        if figure is not None:
            self.writer.add_figure(name, figure, step)

    def finish(self, config: schema.Config, metrics: Mapping[str, float]) -> None:
        """Write the hyper-parameters with the final metrics, in this run's own event file."""
        values = {
            key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in flatten(config)
        }
        writer: Any = self.writer.file_writer
        for summary in hparams(values, dict(metrics)):
            writer.add_summary(summary)
        for name, value in metrics.items():
            self.scalar(name, value, 0)
