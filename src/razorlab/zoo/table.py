"""The zoo's rows as a CSV, a summary and a page."""

from __future__ import annotations

import csv
import statistics
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from .compiling import MORE_BYTES, ROUNDING, CompiledRow
from .measuring import Row

AnyRow = TypeVar("AnyRow", Row, CompiledRow)

FAMILY_BAR = 4.0
MEDIAN_BARS = {"torchvision": 9.0, "timm": 8.0, "transformers": 8.0}
OWN_BARS = {"transformers/llama": 8.0, "transformers/qwen3": 8.0, "transformers/gpt2": 8.0}
COSINE_MEDIAN, COSINE_LOW = 0.9, 0.8


def read(path: Path, kind: type[AnyRow]) -> dict[str, AnyRow]:
    if not path.exists():
        return {}
    kinds = {field.name: field.type for field in fields(kind)}
    cast = {"str": str, "float": float, "int": int}
    with path.open(newline="") as file:
        rows = [kind(**{key: cast[kinds[key]](value) for key, value in line.items()}) for line in csv.DictReader(file)]
    return {row.name: row for row in rows}


def write(path: Path, rows: dict[str, AnyRow], kind: type[AnyRow]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(kind)])
        for name in sorted(rows):
            values = (getattr(rows[name], field.name) for field in fields(kind))
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


def compiled_line(row: CompiledRow) -> str:
    if row.error:
        return f"{row.name:34} {row.seconds:5.1f} s  {row.dense_graphs} graphs dense; {row.error}"
    return (
        f"{row.name:34} {row.seconds:5.1f} s  {row.dense_graphs:3d} > {row.graphs:3d} graphs  difference "
        f"{row.difference:7.1e} (dense {row.dense_difference:7.1e})  forward {row.forward:5}  {row.eager_mb:7.2f} > "
        f"{row.compiled_mb:7.2f} MB (dense {row.dense_eager_mb:8.2f} > {row.dense_mb:8.2f})  {row.reasons}"
    )


def no_more_bytes(row: CompiledRow) -> bool:
    """Whether the compiled razored step saves what the eager one saves. What is more with the dense network, too, is
    the network's own: some do other things where they are traced."""
    return row.compiled_mb <= MORE_BYTES * row.eager_mb + max(row.dense_mb - row.dense_eager_mb, 0)


def compiled_summary(rows: dict[str, CompiledRow]) -> str:
    """How many networks are as they should be in each respect, and those that are not."""
    tried = [row for row in rows.values() if row.dense_eager_mb]
    both = [row for row in tried if not row.dense_error and not row.error]
    ran = [row for row in tried if not row.error]
    one = [row for row in both if row.dense_graphs == 1]
    lines = [
        f"{len(rows)} networks, {len(tried)} run without the compiler; compiled, {len(tried)} dense less "
        f"{sum(bool(row.dense_error) for row in tried)} that fail, razored less {len(tried) - len(ran)}",
        f"{sum(row.graphs == 1 for row in one)} of {len(one)} that are one graph dense are one graph razored",
    ]
    checks = {
        "as many graphs as dense": (both, lambda row: row.graphs == row.dense_graphs),
        "no graph more in a second step than dense": (both, lambda row: row.again <= row.dense_again),
        f"gradients equal to {ROUNDING:g}": (ran, lambda row: row.difference <= ROUNDING),
        f"saved bytes at most {MORE_BYTES:g} of eager's, and what dense has more": (ran, no_more_bytes),
    }
    for what, (rows_here, holds) in checks.items():
        others = [row for row in rows_here if not holds(row)]
        lines.append(f"{len(rows_here) - len(others)} of {len(rows_here)}: {what}")
        lines += [f"  not: {compiled_line(row)}" for row in others]
    lines += [f"  dense failed: {row.name} {row.dense_error}" for row in tried if row.dense_error]
    lines += [f"  failed: {compiled_line(row)}" for row in rows.values() if row.error]
    return "\n".join(lines)
