"""Tables 1 and 2: one row per method, one column per data set, the published figure beside the measured one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from razorlab.recipes import Recipe
from razorlab.tables.render import NOT_MEASURED, NOT_RUN, wrap

NO_RECIPE = "no recipe"

MEMORY = {  # heading: column of ``cells``
    "official formula, MB": "official_mb",
    "saved, MB": "saved_mb",
    "weights, MB": "weights_mb",
    "gradients, MB": "gradients_mb",
    "optimizer state, MB": "optimizer_mb",
    "measured peak, MB": "peak_mb",
    "in all, MB": "total_mb",
    "step, s": "step_s",
}
_SOURCES = {
    "official_mb": ("official_bytes", 1e-6),
    "predicted_mb": ("predicted_bytes", 1e-6),
    "saved_mb": ("saved_bytes", 1e-6),
    "weights_mb": ("weight_bytes", 1e-6),
    "gradients_mb": ("gradient_bytes", 1e-6),
    "optimizer_mb": ("optimizer_bytes", 1e-6),
    "peak_mb": ("peak_bytes", 1e-6),
    "total_mb": ("total_bytes", 1e-6),
    "step_s": ("step_seconds", 1.0),
}


def cells(runs: pd.DataFrame, recipes: Sequence[Recipe]) -> pd.DataFrame:
    """Return one row for each recipe, run or not.

    Columns: ``experiment, row, method, razor, data, seeds, status, accuracy`` (percent, mean over seeds),
    ``accuracy_std`` (sample deviation, NaN for one seed), the same of ``mean_iou``, ``published_accuracy,
    published_formula_mb`` (NaN where nothing was published), and of the runs what ``_SOURCES`` names.

    Args:
        runs: as ``load_runs`` returns them; those of other experiments and of older configurations are left out.
    """
    rows = []
    for recipe in recipes:
        found = runs[runs["newest"] & (runs["experiment"] == recipe.name)] if len(runs) else runs
        published = recipe.published
        row = {
            "experiment": recipe.name,
            "row": recipe.row.name,
            "method": recipe.row.label,
            "razor": recipe.row.groups["razor"],
            "data": recipe.data,
            "seeds": len(found),
            "status": "run" if len(found) else NOT_RUN,
            "published_accuracy": published.accuracy[recipe.data] if published else None,
            "published_formula_mb": published.memory_mb if published else None,
        }
        if len(found):
            accuracy = found["test_top1"].astype(float)
            row |= {"accuracy": accuracy.mean(), "accuracy_std": accuracy.std()}
            iou = found["test_mean_iou"].astype(float)
            row |= {"mean_iou": iou.mean(), "mean_iou_std": iou.std()}
            row |= {name: found[key].astype(float).mean() * scale for name, (key, scale) in _SOURCES.items()}
        rows.append(row)
    names = dict.fromkeys((*rows[0], *_columns_of_a_run())) if rows else ()
    return pd.DataFrame(rows, columns=list(names))


def _columns_of_a_run() -> list[str]:
    return ["accuracy", "accuracy_std", "mean_iou", "mean_iou_std", *_SOURCES]


def pivot(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table as text, one row per method: memory, then measured and published accuracy of each data set.

    Memory and time are the median over the data sets that were run; they differ by the head's size and the sparsity.
    """
    rows = []
    published_columns = table.groupby("data")["published_accuracy"].apply(lambda column: column.notna().any())
    of_pixels = table.groupby("data")["mean_iou"].apply(lambda column: column.notna().any())
    for _, group in table.groupby("row", sort=False):
        ran = group[group["seeds"] > 0]
        row = {"Method": group["method"].iloc[0]}
        if table["published_formula_mb"].notna().any():
            row["published formula, MB"] = _number(group["published_formula_mb"].median(), 0, "not published")
        for heading, column in MEMORY.items():
            digits = 3 if column == "step_s" else 1
            row[heading] = _number(ran[column].median(), digits, NOT_MEASURED if len(ran) else NOT_RUN)
        for _, cell in group.iterrows():
            row[f"{cell['data']}, %"] = _accuracy(cell)
            if of_pixels[cell["data"]]:
                row[f"{cell['data']} mean IoU, %"] = _accuracy(cell, "mean_iou")
            if published_columns[cell["data"]]:
                row[f"{cell['data']} published, %"] = _number(cell["published_accuracy"], 1, "not published")
        rows.append(row)
    return pd.DataFrame(rows).fillna(NO_RECIPE)


def _number(value: float | None, digits: int, otherwise: str) -> str:
    return otherwise if value is None or pd.isna(value) else f"{value:.{digits}f}"


def _accuracy(cell: pd.Series, column: str = "accuracy") -> str:
    if not cell["seeds"]:
        return NOT_RUN
    text = f"{cell[column]:.2f}"
    return text if pd.isna(cell[f"{column}_std"]) else f"{text} ± {cell[f'{column}_std']:.2f}"


def title(table: str, runs: pd.DataFrame) -> str:
    """Say in one line what was run: networks and their weights, data, image size, steps."""
    name = f"{table[:-1].capitalize()} {table[-1]}" if table[-1].isdigit() else table.capitalize()
    if not len(runs):
        return f"{name}: {NOT_RUN}"
    weights = {True: "pretrained", False: "random weights"}
    models = sorted({f"{row.model} ({weights[bool(row.pretrained)]})" for row in runs.itertuples()})
    sizes, batches, steps = (_span(runs[column]) for column in ("image_size", "batch_size", "steps"))
    data = ", ".join(dict.fromkeys(runs["data"]))
    return f"{name}: {', '.join(models)} on {data}, {sizes} px, {steps} steps of {batches} images"


def _span(column: pd.Series) -> str:
    low, high = int(column.min()), int(column.max())
    return str(low) if low == high else f"{low} to {high}"


def note(runs: pd.DataFrame) -> str:
    """Say under a table what its figures are and how they were taken."""
    text = (
        "MB = 1e6 bytes. Official formula: the released code's estimate. Saved: what autograd holds after a forward. "
        "Measured peak: highest allocation of a step above weights, gradients and optimizer state; in all: these four. "
        "Memory and time are "
        "medians over the data sets. Published: TinyTL (arXiv 2007.11622), table 2, memory by its own formula."
    )
    if len(runs):
        unit = "tokens" if runs["task"].eq("text").all() else "px"
        shapes = runs[["measured_batch", "measured_size"]].dropna().drop_duplicates().astype(int)
        text += " Step measured at " + ", ".join(
            f"batch {batch}, {size} {unit}" for batch, size in shapes.itertuples(index=False)
        )
        text += f". Models: {', '.join(sorted(set(runs['model'])))}."
        if runs["protocol"].eq("official").any():
            text += " data.protocol=official: all training images train, the last weights are reported."
    return text


def write_grid(table: pd.DataFrame, runs: pd.DataFrame, folder: Path, heading: str) -> list[Path]:
    """Write ``table.csv`` (plain numbers, one row per cell), ``table.md`` and ``table.tex`` (booktabs)."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"table.{ending}" for ending in ("csv", "md", "tex")]
    table.to_csv(paths[0], index=False, float_format="%.6g")
    text = pivot(table)
    body = text.to_markdown(index=False, disable_numparse=True)
    paths[1].write_text(f"# {heading}\n\n{body}\n\n{wrap(note(runs))}\n", encoding="utf-8")
    paths[2].write_text(to_latex(text, f"{heading}. {note(runs)}"), encoding="utf-8")
    return paths


def to_latex(text: pd.DataFrame, caption: str) -> str:
    """Return a table of text as a booktabs table."""

    def escape(cell: str) -> str:
        return cell.replace("_", r"\_").replace("%", r"\%").replace("±", r"$\pm$")

    latex = text.map(escape)
    latex.columns = [escape(heading) for heading in latex.columns]
    columns = "l" + "r" * (len(text.columns) - 1)
    return latex.to_latex(index=False, caption=escape(caption), column_format=columns)
