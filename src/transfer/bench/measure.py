"""Measuring the rows of one backbone in turns, and the table that comes of it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib
import pandas
import torch
from torch.autograd.profiler import profile

import backrazor as br
from backrazor.memory.peak import in_fresh_process
from transfer.bench.rows import Row
from transfer.files import atomic_write_text
from transfer.records import circumstances

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SHOWN = ["backbone", "row", "saved_MB", "saved_ratio", "peak_MB", "peak_ratio", "step_s", "time_ratio", "codec_share"]
KEY = ["backbone", "precision", "row"]  # what makes two lines of the results the same measurement
_PARTS = ("forward", "backward", "optimizer")


def saved_of(row: Row, threads: int) -> int:
    """What autograd holds after the forward of ``row``, bytes."""
    torch.set_num_threads(threads)
    return row.saved_bytes()


def codec_share_of(row: Row, threads: int) -> float:
    """The share of a step (forward and backward) spent in the library's own operators: selecting, packing, unpacking,
    masks and codes. From PyTorch's profiler, one step after a warm-up step."""
    torch.set_num_threads(threads)
    step = row.build()
    step.forward().backward()
    with profile() as profiled:
        step.forward().backward()
    events = profiled.function_events
    whole = max(event.time_range.end for event in events) - min(event.time_range.start for event in events)
    return sum(event.time_range.elapsed_us() for event in events if event.name.startswith("backrazor::")) / whole


def measure_backbone(
    rows: list[Row], folder: Path, repeats: int, steps: int, what: Sequence[str] = ("peak", "time")
) -> None:
    """Measure peak and time of every row ``repeats`` times, the rows in turn, each in a fresh process.

    One json file a row, quantity and round below ``folder``: what exists is not measured again, so an interrupted run
    goes on. Peaks do not depend on what else the machine does; times want it idle, and the two may be measured apart.
    """
    threads = torch.get_num_threads()
    for round_ in range(repeats):
        for row in rows:
            for quantity in what:
                file = _file(folder, row, quantity, round_)
                if file.exists():
                    continue
                print(f"  round {round_ + 1}/{repeats}, {quantity}: {_name(row)}", flush=True)
                measured = br.memory.measure_step(row.build, repeats=1, steps=steps, what=(quantity,))
                answer: dict = {"circumstances": circumstances(row.device, threads)}
                if quantity == "peak":
                    answer |= {"peak_bytes": measured.peak_bytes, "process_bytes": measured.process_peak_bytes}
                    if round_ == 0:
                        answer["saved_bytes"] = in_fresh_process(saved_of, row, threads)
                else:
                    answer["times"] = measured.time_samples
                    if round_ == 0 and row.razor is not None:
                        answer["codec_share"] = in_fresh_process(codec_share_of, row, threads)
                file.parent.mkdir(parents=True, exist_ok=True)
                atomic_write_text(file, json.dumps(answer))


def _name(row: Row) -> str:
    return f"{row.backbone} {row.precision} {row.label}"


def _file(folder: Path, row: Row, quantity: str, round_: int) -> Path:
    label = row.label.replace(" ", "_").replace(",", "")
    return folder / f"{row.backbone}-{row.precision}-{label}-{quantity}-{round_}.json"


def _read(folder: Path, row: Row, quantity: str) -> dict[int, dict]:
    """Round -> what was measured."""
    found, round_ = {}, 0
    while (file := _file(folder, row, quantity, round_)).exists():
        found[round_] = json.loads(file.read_text())
        round_ += 1
    return found


def table_of(rows: list[Row], folder: Path) -> list[dict]:
    """The lines of the rows that have a peak and a time; the first row, dense, is what the ratios stand beside."""
    dense = rows[0]
    lines = [summary(folder, row, dense) for row in rows]
    return [line for line in lines if line is not None]


def summary(folder: Path, row: Row, dense: Row) -> dict | None:
    """One line of the table, None where peak or time is missing; ratios are dense / row for bytes and row / dense for
    time, round by round, their median."""
    peaks, times = _read(folder, row, "peak"), _read(folder, row, "time")
    dense_peaks, dense_times = _read(folder, dense, "peak"), _read(folder, dense, "time")
    if not (peaks and times and dense_peaks and dense_times):
        return None
    step = {i: statistics.median(sum(t) for t in r["times"]) for i, r in times.items()}
    dense_step = {i: statistics.median(sum(t) for t in r["times"]) for i, r in dense_times.items()}
    ratios = [step[i] / dense_step[i] for i in step if i in dense_step]
    parts = [statistics.median(t[i] for r in times.values() for t in r["times"]) for i in range(len(_PARTS))]
    samples = [r["peak_bytes"] for r in peaks.values()]
    peak, dense_peak = (statistics.median(r["peak_bytes"] for r in p.values()) for p in (peaks, dense_peaks))
    saved, dense_saved = peaks[0]["saved_bytes"], dense_peaks[0]["saved_bytes"]
    share = times[0].get("codec_share")
    made = times[0]["circumstances"]
    return {
        "backbone": row.backbone,
        "precision": row.precision,
        "row": row.label,
        "batch": row.images,
        "saved_MB": round(saved / 1e6, 2),
        "saved_ratio": round(dense_saved / max(saved, 1), 2),
        "peak_MB": round(peak / 1e6, 1),
        "peak_MB_min": round(min(samples) / 1e6, 1),
        "peak_MB_max": round(max(samples) / 1e6, 1),
        "peak_ratio": round(dense_peak / peak, 2),
        "process_MB": round(statistics.median(r["process_bytes"] for r in peaks.values()) / 1e6, 1),
        "step_s": round(statistics.median(step.values()), 4),
        "time_ratio": round(statistics.median(ratios), 3),
        "time_ratio_min": round(min(ratios), 3),
        "time_ratio_max": round(max(ratios), 3),
        **{f"{name}_s": round(part, 4) for name, part in zip(_PARTS, parts, strict=True)},
        "codec_share": None if share is None else round(share, 3),
        "processes_peak": len(peaks),
        "processes_time": len(times),
        "steps": len(times[0]["times"]),
        **{key: str(value) for key, value in made.items()},
    }


def write(table: list[dict], results: Path, command: str) -> pandas.DataFrame:
    """Put the lines into a CSV file, where they replace older ones of the same backbone, precision and row; the same as
    Markdown beside it, and one Pareto figure a backbone. Returns the whole table."""
    frame = pandas.DataFrame(table).assign(command=command)
    if results.exists():
        known = pandas.read_csv(results)
        old = known.set_index(KEY).index.isin(frame.set_index(KEY).index)
        frame = pandas.concat([known[~old], frame], ignore_index=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    _atomically(results, partial(frame.to_csv, index=False))
    parts = [
        f"## {backbone}, {precision}, batch {part['batch'].iloc[0]}\n\n"
        + part[[*SHOWN[1:], "time_ratio_min", "time_ratio_max", "processes_time"]].to_markdown(index=False)
        for (backbone, precision), part in frame.groupby(["backbone", "precision"], sort=False)
    ]
    atomic_write_text(results.with_suffix(".md"), f"`{command}`\n\n" + "\n\n".join(parts) + "\n")
    for (backbone, precision), part in frame.groupby(["backbone", "precision"], sort=False):
        pareto_figure(part, results.with_name(f"{results.stem}-{backbone}-{precision}.png"))
    return frame


def _atomically(file: Path, save: Callable[[Path], object]) -> None:
    part = file.with_name(file.name + ".part")
    save(part)
    part.replace(file)


def front(part: pandas.DataFrame) -> pandas.DataFrame:
    """The rows that no other row beats in both peak and time, by rising peak."""
    ordered = part.sort_values(["peak_MB", "time_ratio"])
    best_before = ordered["time_ratio"].cummin().shift(fill_value=float("inf"))
    return ordered[ordered["time_ratio"] < best_before]


def pareto_figure(part: pandas.DataFrame, path: Path) -> None:
    """Draw time of a step beside dense over measured peak, the spread over processes as a bar, the Pareto front as a
    dashed line."""
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for i, (_, row) in enumerate(part.iterrows()):
        spread = [[row["time_ratio"] - row["time_ratio_min"]], [row["time_ratio_max"] - row["time_ratio"]]]
        marker = "os^Dv"[i // 10 % 5]
        axes.errorbar(row["peak_MB"], row["time_ratio"], yerr=spread, fmt=marker, capsize=3, label=row["row"])
    best = front(part)
    axes.plot(best["peak_MB"], best["time_ratio"], "--", color="black", linewidth=0.8, label="Pareto front")
    first = part.iloc[0]
    axes.set(title=f"{first['backbone']}, batch {first['batch']}, {first['precision']}")
    axes.set(xlabel="measured peak of a step above weights, gradients and optimizer state, MB")
    axes.set(ylabel="time of a step / dense")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    _atomically(path, partial(figure.savefig, dpi=110, format="png"))
    plt.close(figure)
