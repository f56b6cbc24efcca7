"""The zoo's rows as a CSV, a summary and a page."""

from __future__ import annotations

import csv
import statistics
from dataclasses import fields
from pathlib import Path

from .measuring import Row

FAMILY_BAR = 4.0
MEDIAN_BARS = {"torchvision": 9.0, "timm": 8.0, "transformers": 8.0}
OWN_BARS = {"transformers/llama": 8.0, "transformers/qwen3": 8.0, "transformers/gpt2": 8.0}
COSINE_MEDIAN, COSINE_LOW = 0.9, 0.8


def read(path: Path) -> dict[str, Row]:
    if not path.exists():
        return {}
    kinds = {field.name: field.type for field in fields(Row)}
    cast = {"str": str, "float": float, "int": int}
    with path.open(newline="") as file:
        rows = [Row(**{key: cast[kinds[key]](value) for key, value in line.items()}) for line in csv.DictReader(file)]
    return {row.name: row for row in rows}


def write(path: Path, rows: dict[str, Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(Row)])
        for name in sorted(rows):
            values = (getattr(rows[name], field.name) for field in fields(Row))
            writer.writerow([f"{value:.4g}" if isinstance(value, float) else value for value in values])


def line_of(row: Row) -> str:
    if row.error:
        return f"{row.name:34} {row.seconds:5.1f} s  {row.error}"
    return (
        f"{row.name:34} {row.seconds:5.1f} s  {row.dense_mb:8.2f} / {row.saved_mb:7.2f} MB = {row.ratio:5.1f}x  cosine "
        f"{row.cosine:6.3f}  norm {row.norm:5.2f}  dense {row.left_dense:4.0%}  {row.forward:7} {row.replaced:4d}  "
        f"{row.largest_dense}"
    )


def summary(rows: dict[str, Row]) -> str:
    """Medians beside the bars, and every family that is below one."""
    lines = []
    for group, bar in MEDIAN_BARS.items():
        here = [row for name, row in rows.items() if name.startswith(f"{group}/")]
        good = [row for row in here if not row.error]
        if not good:
            continue
        ratio, cosine = (statistics.median(getattr(row, key) for row in good) for key in ("ratio", "cosine"))
        lines.append(
            f"{group}: {len(good)} families, {len(here) - len(good)} failed; dense / saved {ratio:.1f}x in the median "
            f"(bar {bar:g}), cosine {cosine:.3f} (bar {COSINE_MEDIAN})"
        )
        low = sorted((row for row in good if row.ratio < OWN_BARS.get(row.name, FAMILY_BAR)), key=lambda row: row.ratio)
        lines += [f"  below {OWN_BARS.get(row.name, FAMILY_BAR):g}x: {line_of(row)}" for row in low]
        bent = sorted((row for row in good if row.cosine < COSINE_LOW), key=lambda row: row.cosine)
        lines += [f"  cosine below {COSINE_LOW}: {line_of(row)}" for row in bent]
        moved = [row for row in good if row.forward not in ("bits", "formula")]
        lines += [f"  forward not equal in bits: {row.name} {row.forward}" for row in moved]
        lines += [f"  failed: {line_of(row)}" for row in here if row.error]
    return "\n".join(lines)


def markdown(rows: dict[str, Row]) -> str:
    """The table of docs/networks.md."""
    lines = [
        "| family | network | forward | dense MB | saved MB | ratio | cosine | left dense | replaced |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(rows):
        row = rows[name]
        if row.error:
            lines.append(f"| {name} | {row.network} | {row.error} | | | | | | |")
            continue
        lines.append(
            f"| {name} | {row.network} | {row.forward} | {row.dense_mb:.2f} | {row.saved_mb:.2f} | {row.ratio:.1f} | "
            f"{row.cosine:.3f} | {row.left_dense:.0%} | {row.replaced} |"
        )
    return "\n".join(lines)
