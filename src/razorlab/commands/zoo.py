"""Razor one network of every family that torchvision, timm and transformers bring, and say how it went.

    python -m razorlab zoo                          # all that outputs/zoo.csv lacks; an hour or two on one core
    python -m razorlab zoo --only 'timm/swin*'      # those that match a pattern
    python -m razorlab zoo --again --only '*/llama' # measure anew
    python -m razorlab zoo --list                   # names
    python -m razorlab zoo --summary                # medians, and families below the bars, of what has been measured
    python -m razorlab zoo --markdown               # the table of docs/networks.md
    python -m razorlab zoo --compiled               # what torch.compile makes of each, to outputs/zoo_compiled.csv

Each row is written as soon as it is measured, so an interrupted run is taken up by the same command. A row holds, for
one network with random weights on a batch of two random inputs (four images for torchvision's classifiers):

forward       "bits": the output equals that of the dense network in every bit; "formula": that of the dense network
              with attention written out, softmax(q k^T) v; else the largest difference relative to the largest output
dense, saved  MB (1e6 bytes) that autograd holds after the model's forward, dense and razored, without the loss
ratio         dense / saved
cosine, norm  of the razored gradient of all parameters to the dense one, and its norm relative to that
left dense    share of the saved bytes that are still dense, and the largest of them
replaced      layers that became drop-ins

With --compiled, each network is compiled dense and razored, with the backend aot_eager, in a process of its own that
is ended after --limit seconds. Tracing, autograd and what is kept between forward and backward are those of any
backend; inductor's code generation would take minutes per network. A row then holds, for dense and razored:

graphs, breaks, again  graphs and graph breaks of a first step, and further graphs of a second one
difference, cosine     of all gradients to those of the same network without the compiler; the first is relative
forward                "bits", or the largest difference, of the razored outputs with and without the compiler
eager_mb, compiled_mb  MB that autograd holds after the model's forward, without and with the compiler (dense_eager_mb
                       and dense_mb of the dense network)
reasons                graph breaks that only the razored network has

Everything runs on one thread.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch

import backrazor as br
from razorlab.zoo.cases import Case
from razorlab.zoo.compiling import CompiledRow, measure_compiled
from razorlab.zoo.measuring import Row, measure
from razorlab.zoo.table import AnyRow, compiled_line, compiled_summary, line_of, markdown, read, summary, write
from razorlab.zoo.vision import timm_cases, torchvision_cases
from razorlab.zoo.words import transformers_cases


def cases(patterns: list[str]) -> Iterator[Case]:
    """Those whose names match one of ``patterns``."""
    groups = {"torchvision": torchvision_cases, "timm": timm_cases, "transformers": transformers_cases}
    for group, found in groups.items():
        if any(fnmatchcase(group, pattern.partition("/")[0]) for pattern in patterns):
            yield from (case for case in found() if any(fnmatchcase(case.name, pattern) for pattern in patterns))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", action="append", metavar="PATTERN", help="names to run, with wildcards; may be repeated"
    )
    parser.add_argument("--out", type=Path, help="the CSV (outputs/zoo.csv, or outputs/zoo_compiled.csv)")
    parser.add_argument("--compiled", action="store_true", help="what torch.compile makes of them")
    parser.add_argument("--limit", type=float, default=600, help="seconds per network with --compiled (600)")
    parser.add_argument("--again", action="store_true", help="measure what the CSV holds already, too")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=WORD", help="another field of RazorConfig")
    parser.add_argument("--minutes", type=float, help="stop after this time; the same command goes on from there")
    for flag, text in (
        ("list", "print names"),
        ("summary", "print what the CSV says"),
        ("markdown", "print its table"),
    ):
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    chosen = parser.parse_args(arguments)
    out = chosen.out or Path("outputs/zoo_compiled.csv" if chosen.compiled else "outputs/zoo.csv")
    patterns = chosen.only or ["*"]
    if chosen.summary or chosen.markdown:
        print(_told(out, chosen))
        return 0
    config = br.RazorConfig(chosen.sparsity, **dict(item.split("=", 1) for item in chosen.set))
    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here has pretrained weights
    warnings.simplefilter("ignore")
    if chosen.list:
        for case in cases(patterns):
            print(case.name, case.network)
    elif chosen.compiled:
        _fill(out, CompiledRow, chosen, lambda case: measure_compiled(case, config, chosen.limit), compiled_line)
    else:
        _fill(out, Row, chosen, lambda case: measure(case, config), line_of)
    return 0


def _told(out: Path, chosen: argparse.Namespace) -> str:
    if chosen.compiled:
        return compiled_summary(read(out, CompiledRow))
    return markdown(read(out, Row)) if chosen.markdown else summary(read(out, Row))


def _fill(
    out: Path,
    kind: type[AnyRow],
    chosen: argparse.Namespace,
    measured: Callable[[Case], AnyRow],
    told: Callable[[AnyRow], str],
) -> None:
    """Measure what the CSV lacks, and write it after each row."""
    rows, start = read(out, kind), time.monotonic()
    for case in cases(chosen.only or ["*"]):
        if case.name in rows and not chosen.again:
            continue
        if chosen.minutes is not None and time.monotonic() - start > 60 * chosen.minutes:
            print("time is up; the same command goes on from here")
            break
        rows[case.name] = row = measured(case)
        print(told(row), flush=True)
        write(out, rows, kind)
        gc.collect()
