"""Figures from summaries and records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from razorlab.tables.labels import Labelled, label_points, marker_boxes

SMALLEST_SPAN = 4.0  # points of accuracy that the vertical axis shows at least
DPI = 150
BUDGET_ROWS = "compile, budget "  # of the step benchmark; the share of the activations follows
PART_COLUMNS = {  # of a summary, from the bottom of a bar to its top: the legend
    "weights_mb": "weights",
    "gradients_mb": "gradients",
    "optimizer_mb": "optimizer state",
    "peak_mb": "peak above these",
}


def pareto_front(points: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of ``points`` that no other row beats in both ``peak_mb`` and ``accuracy``, by rising peak."""
    ordered = points.sort_values(["peak_mb", "accuracy"], ascending=[True, False])
    best_before = ordered["accuracy"].cummax().shift(fill_value=-float("inf"))
    return ordered[ordered["accuracy"] > best_before]


def fastest_front(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that no other row beats in both ``peak_MB`` and ``time_ratio``, by rising peak."""
    return pareto_front(rows.assign(peak_mb=rows["peak_MB"], accuracy=-rows["time_ratio"]))


def time_against_peak(rows: pd.DataFrame, path: Path) -> Path:
    """Draw time of a step beside dense over measured peak, the spread over processes as a bar, the Pareto front as a
    dashed line; ``rows`` of one backbone, with the columns of the step benchmark.

    The rows of a compiler's budget are one dotted line, the share of the activations written beside each point.
    """
    is_budget = rows["row"].str.startswith(BUDGET_ROWS)
    alone, budgets = rows[~is_budget], rows[is_budget]
    entries = len(alone) + 2
    figure, axes = plt.subplots(figsize=(7.2, max(4.2, 0.19 * entries + 0.4)), layout="constrained")
    for i, (_, row) in enumerate(alone.iterrows()):
        spread = [[row["time_ratio"] - row["time_ratio_min"]], [row["time_ratio_max"] - row["time_ratio"]]]
        marker = "os^Dv"[i // 10 % 5]
        axes.errorbar(row["peak_MB"], row["time_ratio"], yerr=spread, fmt=marker, capsize=3, label=row["row"])
    best = fastest_front(rows)
    axes.plot(best["peak_MB"], best["time_ratio"], "--", color="black", linewidth=0.8, label="Pareto front")
    points = []
    if len(budgets):
        ordered = budgets.sort_values("peak_MB")
        low, high = (abs(ordered["time_ratio"] - ordered[f"time_ratio_{end}"]) for end in ("min", "max"))
        name = BUDGET_ROWS.strip()
        axes.errorbar(ordered["peak_MB"], ordered["time_ratio"], (low, high), fmt="P:", color="grey", label=name)
        for (_, row), spread in zip(ordered.iterrows(), low.combine(high, max), strict=True):
            points.append(
                Labelled(row["peak_MB"], row["time_ratio"], row["row"].removeprefix(BUDGET_ROWS), spread, "grey")
            )
    first = rows.iloc[0]
    axes.set(title=f"{first['backbone']}, batch {first['batch']}, {first['precision']}")
    axes.set(xlabel="measured peak of a step above weights, gradients and optimizer state, MB")
    axes.set(ylabel="time of a step / dense")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    if points:
        others = [Labelled(row["peak_MB"], row["time_ratio"], "") for _, row in alone.iterrows()]
        label_points(axes, points, taken=marker_boxes(axes, others), line=best[["peak_MB", "time_ratio"]].to_numpy())
    return _save(figure, path)


def accuracy_against_peak(summary: pd.DataFrame, path: Path) -> Path | None:
    """Draw test accuracy over measured peak, one point per row with its name and figures beside it; None without a
    peak.

    Rows without a razor, whose gradient is exact, are squares; razored rows are dots. A bar is the deviation over
    seeds. The Pareto front is a dashed line.

    Args:
        summary: with columns ``method, razor, seeds, accuracy, accuracy_std, peak_mb``; ``test_images``, where it is
            there, is said in the label of the axis.
    """
    drawn = summary.dropna(subset=["accuracy", "peak_mb"])
    if drawn.empty:
        return None
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    front = pareto_front(drawn)
    axes.plot(front["peak_mb"], front["accuracy"], "--", color="grey", linewidth=0.8, zorder=0)
    shared = "full, " if drawn["method"].str.startswith("full, ").all() else ""
    points = []
    for i, (_, row) in enumerate(drawn.iterrows()):
        spread, color = 0.0 if pd.isna(row["accuracy_std"]) else float(row["accuracy_std"]), f"C{i % 10}"
        marker = "s" if row["razor"] == "none" else "o"
        axes.errorbar(row["peak_mb"], row["accuracy"], yerr=spread or None, fmt=marker, capsize=3, color=color)
        figures = f"{row['accuracy']:.1f}{f' ± {spread:.1f}' if spread else ''}%, {row['peak_mb']:.0f} MB"
        name = row["method"].removeprefix(shared)
        points.append(Labelled(row["peak_mb"], row["accuracy"], f"{name}\n{figures}", spread, color))
    axes.set_xlim(left=0, right=1.1 * drawn["peak_mb"].max())
    # No closer than this: on a small test split a single image would fill the axis. No accuracy is above 100.
    low, high = axes.get_ylim()
    margin = max(0.1 * (high - low), (SMALLEST_SPAN - (high - low)) / 2)
    axes.set_ylim(low - margin, high + margin)
    axes.set_yticks([tick for tick in axes.get_yticks() if low - margin < tick <= min(100, high + margin)])
    axes.set_xlabel("measured peak of a step above weights, gradients and optimizer state, MB")
    axes.set_ylabel(_accuracy_label(drawn))
    axes.grid(alpha=0.3)
    handles = [plt.Line2D([], [], marker=m, linestyle="", color="grey") for m in "so"]
    legend = axes.legend(handles, ["exact gradient", "pruned activations"], fontsize="small", loc="lower right")
    label_points(axes, points, taken=[legend.get_window_extent()], line=front[["peak_mb", "accuracy"]].to_numpy())
    return _save(figure, path)


def _accuracy_label(drawn: pd.DataFrame) -> str:
    """The vertical axis's label: what is scored, over how many images or texts, and seeds."""
    label, seeds = "test accuracy, %", int(drawn["seeds"].max()) if "seeds" in drawn else 1
    images = drawn["test_images"].dropna() if "test_images" in drawn else pd.Series(dtype=float)
    parts = [f"{int(images.iloc[0])} tested"] if len(images) else []
    parts += [f"{seeds} seeds"] if seeds > 1 else ["one seed"]
    return f"{label} ({', '.join(parts)})"


def memory_by_part(rows: Mapping[str, Mapping[str, float]], path: Path, title: str = "") -> Path | None:
    """Draw all that a step holds, one bar per row, stacked by its four parts, the sum at its end; None without rows.

    Args:
        rows: label of the row -> the columns of ``PART_COLUMNS``, MB.
    """
    if not rows:
        return None
    table = pd.DataFrame(rows).T[list(PART_COLUMNS)].rename(columns=PART_COLUMNS).iloc[::-1]
    figure, axes = plt.subplots(figsize=(7.2, 1.6 + 0.4 * len(table)), layout="constrained")
    table.plot.barh(stacked=True, ax=axes, width=0.7, title=title or None, legend=False)
    for place, total in enumerate(table.sum(axis=1)):
        axes.text(total, place, f" {total:.0f} MB", va="center", fontsize="small")
    axes.margins(x=0.18)
    axes.set_xlabel("held by a training step, MB")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(fontsize="small", loc="outside lower center", ncols=len(PART_COLUMNS))
    return _save(figure, path)


def memory_by_role(roles: Mapping[str, Mapping[str, float]], path: Path) -> Path | None:
    """Draw what autograd holds after a forward, one bar per row, stacked by the role of the tensors; None without rows.

    Args:
        roles: label of the row -> role -> bytes, as ``saved_by_role`` of a record.
    """
    if not roles:
        return None
    table = pd.DataFrame(roles).fillna(0.0).T * 1e-6
    table = table[table.sum().sort_values(ascending=False).index]
    figure, axes = plt.subplots(figsize=(6.8, 1.2 + 0.4 * len(table)), layout="constrained")
    table.iloc[::-1].plot.barh(stacked=True, ax=axes)
    axes.set_xlabel("held by autograd after a forward, MB")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small", title="role")
    return _save(figure, path)


def layer_bars(rows: Mapping[str, Mapping[str, float]], axes: plt.Axes, most: int = 25) -> None:
    """Draw what each layer keeps for backward, largest first, one bar per row; the legend has the sums of all layers.

    Args:
        rows: label of the row -> layer -> bytes, as ``saved_by_layer`` of a record; the first row sets the order.
        most: layers shown.
    """
    table = pd.DataFrame(rows).fillna(0.0) * 1e-6
    table = table.sort_values(list(table.columns), ascending=False).rename(index={"": "(loss)"})
    smaller = len(table) - most
    table.iloc[:most].iloc[::-1].plot.barh(ax=axes, width=0.8)
    more = f"; {smaller} layers with less are not drawn" if smaller > 0 else ""
    axes.set_xlabel(f"held by autograd after a forward, MB{more}")
    axes.tick_params(axis="y", labelsize="small")
    axes.grid(axis="x", alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    sums = [f"{label}: {table[label].sum():.1f} MB in all" for label in labels]
    axes.legend(handles, sums, fontsize="small", loc="lower right")


def memory_by_layer(rows: Mapping[str, Mapping[str, float]], path: Path) -> Path | None:
    """Draw ``layer_bars`` of several rows, so that a layer's bars lie beside each other; None without rows."""
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(7.5, 7.5), layout="constrained")
    layer_bars(rows, axes)
    return _save(figure, path)


def memory_curves(table: pd.DataFrame, x: str, xlabel: str, path: Path) -> Path | None:
    """Draw memory over ``x``, a panel for each model, a line for each preset and column; None without rows.

    Args:
        table: columns ``model, preset``, ``x`` and any of ``peak_mb, predicted_peak_mb, saved_mb, official_mb``.
    """
    if table.empty:
        return None
    models = list(dict.fromkeys(table["model"]))
    across = min(3, len(models))
    down = -(-len(models) // across)
    figure, panels = plt.subplots(down, across, figsize=(4.2 * across, 3.2 * down), layout="constrained", squeeze=False)
    styles = {"peak_mb": "o-", "predicted_peak_mb": "x:", "saved_mb": "s--", "official_mb": "-."}
    names = {
        "peak_mb": "measured peak",
        "predicted_peak_mb": "predicted peak",
        "saved_mb": "saved",
        "official_mb": "official formula",
    }
    presets = list(dict.fromkeys(table["preset"]))
    for panel, model in zip(panels.flat, models, strict=False):
        for preset, lines in table[table["model"] == model].groupby("preset", sort=False):
            ordered = lines.sort_values(x)
            for column, style in styles.items():
                if column in ordered and ordered[column].notna().any():
                    color = f"C{presets.index(preset)}"
                    label = f"{preset}, {names[column]}"
                    panel.plot(ordered[x], ordered[column], style, color=color, markersize=4, label=label)
        panel.set_title(model)
        panel.set_yscale("log")
        panel.set_xlabel(xlabel)
        panel.set_ylabel("MB")
        panel.grid(alpha=0.3, which="both")
    for panel in list(panels.flat)[len(models) :]:
        panel.remove()
    if panels.flat[0].get_lines():
        panels.flat[0].legend(fontsize="x-small")
    return _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path
