"""Measuring the rows of one backbone in turns, and the table that comes of it."""

from __future__ import annotations

import functools
import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
import torch
from torch.autograd.profiler import profile

import backrazor as br
from backrazor.memory.processes import in_fresh_process
from razorlab.bench.rows import Row, pinning_notice
from razorlab.files import atomic_write, atomic_write_text
from razorlab.records import circumstances
from razorlab.tables.figures import time_against_peak
from razorlab.training.costs import PARTS, gpu_circumstances

TOGETHER = 5  # rows, beside dense, whose processes stand ready at a time: memory must hold them all
SHOWN = ["backbone", "row", "saved_MB", "saved_ratio", "peak_MB", "peak_ratio", "step_s", "time_ratio", "codec_share"]
WHOLE = ["weights_MB", "gradients_MB", "optimizer_MB", "total_MB", "total_ratio"]  # columns younger than the others
KEY = ["backbone", "precision", "row", "device", "batch", "git_commit"]  # of one measurement; the commit without its +
SHARED = KEY[:-1]  # of lines whose newest alone is shown
QUANTITIES = ("peak", "time")
Failures = dict[tuple[Row, str], str]  # row and quantity -> reason
_PARTS = ("forward", "backward", "optimizer")


def saved_of(row: Row, threads: int) -> int:
    """What autograd holds after the forward of ``row``, bytes."""
    torch.set_num_threads(threads)
    return row.saved_bytes()


def codec_share_of(row: Row, threads: int) -> float:
    """The share of a step (forward and backward) spent in the library's own operators: selecting, packing, unpacking,
    masks and codes. From PyTorch's profiler, one step after a warm-up step; on CUDA the time of the operators' kernels
    beside the step's time between two events of its own, since on the host an operator's time is that of enqueueing."""
    torch.set_num_threads(threads)
    step = row.build()
    step.forward().backward()
    if row.device == "cuda":
        return _share_on_the_device(step)
    with profile() as profiled:
        step.forward().backward()
    events = profiled.function_events
    whole = max(event.time_range.end for event in events) - min(event.time_range.start for event in events)
    return sum(event.time_range.elapsed_us() for event in events if event.name.startswith("backrazor::")) / whole


def _share_on_the_device(step: br.memory.Step) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with profile(use_device="cuda") as profiled:
        start.record()
        step.forward().backward()
        end.record()
        torch.cuda.synchronize()
    ours = [event for event in profiled.function_events if event.name.startswith("backrazor::")]
    return sum(event.device_time_total for event in ours) / (1e3 * start.elapsed_time(end))  # microseconds, ms


def measure_backbone(
    rows: list[Row], folder: Path, repeats: int, steps: int, what: Sequence[str] = QUANTITIES
) -> Failures:
    """Measure peak and time of every row ``repeats`` times, each in a fresh process; the first row is dense.

    For the time the processes of ``TOGETHER`` rows and one of dense stand ready together and run a step each in turn
    (on a CUDA device, whose speed is steady and whose memory one row may fill: one process after the other). One json
    file a row, quantity and round below ``folder``: what exists is not measured again, so an interrupted run goes on,
    and a row added later takes its turns with a dense process of its own. Peaks do not depend on what else the machine
    does; times want it idle, and the two may be measured apart.

    Returns what failed: such a row is tried no further, and the others go on.
    """
    threads = torch.get_num_threads()
    made = {"circumstances": circumstances(_device_name(rows[0]), threads, gpu=gpu_circumstances(rows[0].device))}
    file_of(folder, rows[0], "peak", 0).parent.mkdir(parents=True, exist_ok=True)
    failed: Failures = {}

    def missing(quantity: str) -> list[Row]:
        out = {row for row, _ in failed}
        found = [row for row in rows if row not in out and not file_of(folder, row, quantity, round_).exists()]
        return found if quantity in what else []

    for round_ in range(repeats):
        for row in missing("peak"):
            print(f"  round {round_ + 1}/{repeats}, peak: {name_of(row)}", flush=True)
            try:
                answer = _peak_of(row, threads, with_saved=round_ == 0)
            except RuntimeError as error:
                failed[row, "peak"] = _told(error)
            else:
                atomic_write_text(file_of(folder, row, "peak", round_), json.dumps(made | answer))
        late = missing("time")
        groups = [late[start : start + TOGETHER] for start in range(0, len(late), TOGETHER)]
        while groups:
            group = groups.pop(0)
            print(f"  round {round_ + 1}/{repeats}, time, in turns: {', '.join(map(name_of, group))}", flush=True)
            try:
                answers = _times_of(group, rows[0], threads, steps, with_share=round_ == 0)
            except RuntimeError as error:
                if len(group) > 1:  # which of them, is seen when each takes its turns with dense alone
                    groups = [[row] for row in group] + groups
                    continue
                failed[group[0], "time"] = _told(error)
                if group[0] == rows[0]:  # beside which the others would stand
                    break
            else:
                for row, answer in answers.items():
                    atomic_write_text(file_of(folder, row, "time", round_), json.dumps(made | answer))
    return failed


def _told(error: RuntimeError) -> str:
    """The reason why a measuring process failed or died; its traceback goes to the terminal."""
    print(f"  failed: {error}", file=sys.stderr, flush=True)
    return reason_of(str(error))


def reason_of(text: str) -> str:
    """The line of a traceback that names the error, else its last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = re.findall(r"^[\w.]*(?:Error|Exception|Interrupt|Exit)\b.*", text, re.MULTILINE)
    return str([*lines, *named][-1]) if lines else "no reason was given"


def _peak_of(row: Row, threads: int, with_saved: bool) -> dict[str, Any]:
    if row.offload:
        print(f"  {pinning_notice(row)}", flush=True)
    peak = br.memory.measure_step(row.build, repeats=1, what=("peak",))
    answer: dict[str, Any] = {"peak_bytes": peak.peak_bytes, "process_bytes": peak.process_peak_bytes}
    answer |= {name: getattr(peak, name) for name in (*PARTS, "total_bytes")}
    if peak.bare_samples:
        answer["above_bare_bytes"] = peak.above_bare_bytes
    if peak.reserved_samples:
        answer["reserved_bytes"] = peak.reserved_bytes
    if with_saved:
        answer["saved_bytes"] = in_fresh_process(saved_of, row, threads)
    return answer


def _times_of(group: list[Row], dense: Row, threads: int, steps: int, with_share: bool) -> dict[Row, dict[str, Any]]:
    turn = {row.label: row.build for row in [dense, *group]}
    turns = "process" if dense.device == "cuda" else "step"
    times = br.memory.measure_steps(turn, repeats=1, steps=steps, what=("time",), turns=turns)
    answers: dict[Row, dict[str, Any]] = {}
    for row in group:
        answers[row] = {"times": times[row.label].time_samples, "dense_times": times[dense.label].time_samples}
        if with_share and row.razor is not None and not row.compiled:  # where sealed steps hide it
            answers[row]["codec_share"] = in_fresh_process(codec_share_of, row, threads)
    return answers


def name_of(row: Row) -> str:
    return f"{row.backbone} {row.precision} {row.label}"


def file_of(folder: Path, row: Row, quantity: str, round_: int) -> Path:
    place = re.sub(r"[^\w.]+", "_", f"{_device_name(row)}-{_commit()}")
    label = row.label.replace(" ", "_").replace(",", "")
    name = f"{row.backbone}-{row.precision}-batch{row.images}-{label}-{quantity}-{round_}"
    return folder / place / f"{name}.json"


def _device_name(row: Row) -> str:
    return torch.cuda.get_device_name() if row.device == "cuda" else row.device


@functools.cache
def _commit() -> str:
    """The commit of this code; what a benchmark writes itself changes files, so that its + is left out."""
    return str(circumstances("cpu", 1)["git_commit"]).rstrip("+")


def _read(folder: Path, row: Row, quantity: str) -> dict[int, dict]:
    """Round -> what was measured."""
    found, round_ = {}, 0
    while (file := file_of(folder, row, quantity, round_)).exists():
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
    time: a round's is the median over its turns, and the table's the median over rounds, with their range."""
    peaks, times, dense_peaks = _read(folder, row, "peak"), _read(folder, row, "time"), _read(folder, dense, "peak")
    if not (peaks and times and dense_peaks):
        return None
    step = [statistics.median(sum(t) for t in r["times"]) for r in times.values()]
    ratios = [
        statistics.median(sum(t) / sum(d) for t, d in zip(r["times"], r["dense_times"], strict=True))
        for r in times.values()
    ]
    parts = [statistics.median(t[i] for r in times.values() for t in r["times"]) for i in range(len(_PARTS))]
    samples = [r["peak_bytes"] for r in peaks.values()]
    peak, dense_peak = (statistics.median(r["peak_bytes"] for r in p.values()) for p in (peaks, dense_peaks))
    saved, dense_saved = peaks[0]["saved_bytes"], dense_peaks[0]["saved_bytes"]
    share = times[0].get("codec_share")
    reserved = peaks[0].get("reserved_bytes")
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
        **_whole(list(peaks.values()), list(dense_peaks.values())),
        "reserved_MB": None if reserved is None else round(reserved / 1e6, 1),
        "process_MB": round(statistics.median(r["process_bytes"] for r in peaks.values()) / 1e6, 1),
        "step_s": round(statistics.median(step), 4),
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


def _whole(peaks: list[dict], dense: list[dict]) -> dict[str, float | None]:
    """All that a step holds: the parts beside its peak, the sum, how much less that is than dense, and the process
    above itself before the step was built. None where the file is older than the column."""

    def median(rounds: list[dict], name: str) -> float | None:
        found = [one[name] for one in rounds if name in one]
        return round(statistics.median(found) / 1e6, 1) if found else None

    total, whole = median(peaks, "total_bytes"), median(dense, "total_bytes")
    names = {"weights": "weight_bytes", "gradients": "gradient_bytes", "optimizer": "optimizer_bytes"}
    return {
        **{f"{name}_MB": median(peaks, column) for name, column in names.items()},
        "total_MB": total,
        "total_ratio": round(whole / total, 2) if total and whole else None,
        "above_bare_MB": median(peaks, "above_bare_bytes"),
    }


def write(table: list[dict], results: Path, command: str) -> pandas.DataFrame:
    """Put the lines into a CSV file, where they replace older ones of the same ``KEY``; the newest of each device and
    batch as Markdown beside it, and as one Pareto figure per backbone. Returns the whole table."""
    frame = pandas.DataFrame(table).assign(command=command)
    if results.exists():
        known = pandas.read_csv(results, dtype={"git_commit": str})
        old = _keys(known).isin(_keys(frame))
        frame = pandas.concat([known[~old], frame], ignore_index=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(results) as file:
        frame.to_csv(file, index=False)
    parts, figures = [], set()
    newest = frame.drop_duplicates(SHARED, keep="last")
    for (backbone, precision, device, batch), part in newest.groupby([c for c in SHARED if c != "row"], sort=False):
        whole = [name for name in WHOLE if name in part and part[name].notna().any()]
        shown = part[[*SHOWN[1:], *whole, "time_ratio_min", "time_ratio_max", "processes_time"]].to_markdown(
            index=False
        )
        parts.append(f"## {backbone}, {precision}, batch {batch}, {device}\n\n{shown}")
        figure = f"{results.stem}-{backbone}-{precision}"
        if figure in figures:  # another device or batch of the same
            figure += "-" + re.sub(r"[^\w.]+", "_", f"batch{batch}-{device}")
        figures.add(figure)
        time_against_peak(part, results.with_name(f"{figure}.png"))
    atomic_write_text(results.with_suffix(".md"), f"`{command}`\n\n" + "\n\n".join(parts) + "\n")
    return frame


def _keys(frame: pandas.DataFrame) -> pandas.MultiIndex:
    """What tells the lines of the results apart."""
    plain = frame[KEY].assign(git_commit=frame["git_commit"].astype(str).str.rstrip("+"))
    return pandas.MultiIndex.from_frame(plain)
