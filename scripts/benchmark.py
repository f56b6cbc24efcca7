"""Measure dense training, its rivals and Back Razor on every backbone: saved bytes, peak and time of a step.

    python scripts/benchmark.py                                  # all backbones, float32; resumes where it was
    interrupted python scripts/benchmark.py --backbones proxylessnas --quick # one backbone in minutes

Every figure comes from a fresh process; the rows of a backbone take turns, and the table holds medians with their
spread and the median of the ratios to dense pair by pair. Operator tests run first: a benchmark of wrong gradients is
none.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pandas
import torch

import backrazor as br
from backrazor.memory.peak import in_fresh_process
from transfer.bench.rows import Row, rows_of
from transfer.records import circumstances

BACKBONES = ("efficientnet_lite0", "mobilenetv2", "proxylessnas", "resnet18", "resnet50", "vit_b16")
QUICK = ("dense", "checkpointing by block", "compact 0.9", "compact 0.97")
GATE = ("tests/backrazor/test_operators.py", "tests/backrazor/test_topk.py")


def operators_are_green() -> bool:
    """Whether the operator tests pass; their output goes to the terminal."""
    files = [name for name in GATE if Path(name).exists()]
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *files]).returncode == 0


def saved_of(row: Row, threads: int) -> int:
    torch.set_num_threads(threads)
    return row.saved_bytes()


def measure_backbone(rows: list[Row], folder: Path, repeats: int, steps: int) -> list[dict]:
    """One json file a row and round below ``folder``: what exists is not measured again."""
    threads = torch.get_num_threads()
    for round_ in range(repeats):
        for row in rows:
            file = (
                folder / f"{row.backbone}-{row.precision}-{row.label.replace(' ', '_').replace(',', '')}-{round_}.json"
            )
            if file.exists():
                continue
            print(f"  round {round_ + 1}/{repeats}: {row.backbone} {row.precision} {row.label}", flush=True)
            measured = br.memory.measure_step(row.build, repeats=1, steps=steps)
            answer = {
                "backbone": row.backbone,
                "precision": row.precision,
                "label": row.label,
                "batch": row.images,
                "image": row.image,
                "peak_bytes": measured.peak_bytes,
                "process_bytes": measured.process_peak_bytes,
                "times": measured.time_samples,
            }
            if round_ == 0:
                answer["saved_bytes"] = in_fresh_process(saved_of, row, threads)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".part")
            partial.write_text(json.dumps(answer))
            partial.rename(file)
    return [summary(folder, row, rows[0], repeats) for row in rows]


def _read(folder: Path, row: Row, repeats: int) -> list[dict]:
    stem = f"{row.backbone}-{row.precision}-{row.label.replace(' ', '_').replace(',', '')}"
    return [json.loads((folder / f"{stem}-{round_}.json").read_text()) for round_ in range(repeats)]


def summary(folder: Path, row: Row, dense: Row, repeats: int) -> dict:
    """One line of the table; ratios are dense / row for bytes and row / dense for time, round by round, their
    median."""
    rounds, base = _read(folder, row, repeats), _read(folder, dense, repeats)
    step = [statistics.median(sum(t) for t in r["times"]) for r in rounds]
    dense_step = [statistics.median(sum(t) for t in r["times"]) for r in base]
    ratios = [a / b for a, b in zip(step, dense_step, strict=True)]
    parts = [statistics.median(t[i] for r in rounds for t in r["times"]) for i in range(3)]
    peak = statistics.median(r["peak_bytes"] for r in rounds)
    return {
        "backbone": row.backbone,
        "precision": row.precision,
        "row": row.label,
        "batch": row.images,
        "saved_MB": round(rounds[0]["saved_bytes"] / 1e6, 2),
        "saved_ratio": round(base[0]["saved_bytes"] / max(rounds[0]["saved_bytes"], 1), 2),
        "peak_MB": round(peak / 1e6, 1),
        "peak_ratio": round(statistics.median(r["peak_bytes"] for r in base) / peak, 2),
        "process_MB": round(statistics.median(r["process_bytes"] for r in rounds) / 1e6, 1),
        "step_s": round(statistics.median(step), 4),
        "time_ratio": round(statistics.median(ratios), 3),
        "time_ratio_min": round(min(ratios), 3),
        "time_ratio_max": round(max(ratios), 3),
        "forward_s": round(parts[0], 4),
        "backward_s": round(parts[1], 4),
        "optimizer_s": round(parts[2], 4),
        "processes": repeats,
        "steps": len(rounds[0]["times"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=BACKBONES, choices=BACKBONES)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rows", nargs="+", help="labels of the rows to run; dense always runs")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes a figure")
    parser.add_argument("--steps", type=int, default=7, help="timed steps a process")
    parser.add_argument("--quick", action="store_true", help="four rows, one process of five steps")
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmark"), help="where measurements are kept")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/steps.csv"))
    parser.add_argument("--skip-tests", action="store_true", help="do not run the operator tests first")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.steps, options.rows = 1, 5, options.rows or QUICK
    if not options.skip_tests and not operators_are_green():
        print("benchmark.py: the operator tests fail, so nothing was measured: mend them first", file=sys.stderr)
        return 1
    for backbone in options.backbones:
        rows = rows_of(backbone, options.precision)
        if options.rows:
            rows = [row for row in rows if row.label == "dense" or row.label in options.rows]
        table = measure_backbone(rows, options.folder, options.repeats, options.steps)
        frame = pandas.DataFrame(table)
        common = circumstances("cpu", torch.get_num_threads())
        known = pandas.read_csv(options.results) if options.results.exists() else pandas.DataFrame()
        stamped = frame.assign(command="python scripts/benchmark.py", **{k: str(v) for k, v in common.items()})
        options.results.parent.mkdir(parents=True, exist_ok=True)
        pandas.concat([known, stamped]).to_csv(options.results, index=False)
        columns = ["backbone", "row", "saved_MB", "saved_ratio", "peak_MB", "peak_ratio", "step_s", "time_ratio"]
        print(frame[columns].to_markdown(index=False), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
