"""Figures from a summary."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SMALLEST_SPAN = 4.0  # points of accuracy that the vertical axis shows at least


def accuracy_against_peak(summary: pd.DataFrame, path: Path) -> Path | None:
    """Draw test accuracy over measured peak, one point a row, its spread over seeds as a bar; None without a peak."""
    drawn = summary.dropna(subset=["accuracy", "peak_mb"])
    if drawn.empty:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for _, row in drawn.iterrows():
        spread = None if pd.isna(row["accuracy_std"]) else row["accuracy_std"]
        axes.errorbar(row["peak_mb"], row["accuracy"], yerr=spread, fmt="o", capsize=3, label=row["method"])
    axes.set_xlim(left=0)
    # No closer than this: on a small test split a single image would fill the axis.
    low, high = axes.get_ylim()
    margin = max(0.0, SMALLEST_SPAN - (high - low)) / 2
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlabel("measured peak of a step above weights, gradients and optimizer state, MB")
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
