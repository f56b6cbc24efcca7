"""What the whole process holds at most while it trains: dense, its rivals, and ours, at the same batch and precision.

    python benchmarks/whole_process.py                         # every row that results/whole_process.csv lacks
    python benchmarks/whole_process.py --backbones vit_b16 --rows dense "compact 0.97, released"
    python benchmarks/whole_process.py --figure                # the stacked bars alone, from the CSV

Each row runs in a process of its own, on one thread, under an allocator that returns freed memory at once, and is
appended to the CSV when it is measured. Random weights, frozen batch norm, SGD with momentum, float32.

bare       the resident set after torch, timm and the benchmark are imported and two steps of a small plain network
           were taken: what PyTorch loads at its first step is in it, and ``import backrazor`` (3 MB), which the
           benchmark needs for every row. No row's own libraries are.
loaded     the same after the row's own libraries: our kernels, bitsandbytes, peft, the compiler.
ordinary   the highest resident set of a step in PyTorch's usual loop, which sets gradients to None before the next
           forward. ``above_bare`` is this less bare, ``above_loaded`` this less loaded.
four parts weights, gradients, optimizer state, and the peak above them, of a step whose gradients stay allocated: the
           definition of every other table. Counted from tensors, but for the peak.

Written: results/whole_process.csv, results/whole_process-<backbone>.png.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas
import torch
import torch.nn.functional as F
from _circumstances import append_rows, circumstances
from torch import nn

import backrazor as br
from backrazor.memory.meters import high_water_mark, reset_high_water_mark, resident_bytes
from backrazor.memory.processes import in_fresh_process
from razorlab.bench.rows import Row
from razorlab.tables.figures import PART_COLUMNS, memory_by_part
from razorlab.training.optimisation import bitsandbytes_optimizers

RESULTS = Path(__file__).parent / "results"
BACKBONES = ("mobilenetv2", "resnet50", "vit_b16")
BUDGETS = (0.5, 0.2, 0.05)  # shares of the activations that the compiler may keep, the rest is computed again
FIGURE_ROWS = ("dense", "checkpointing by block", "micro-batches", "compile", "LoRA", "compact 0.97")


@dataclass(frozen=True)
class Case:
    """A row of the step benchmark, and how the optimizer takes its step.

    released: gradients are freed as soon as their parameter has stepped. state8: momentum at 8 bits. budget: share of
        the activations that the compiled step may keep; None does not compile. lora: adapters of rank 8 train alone.
    """

    row: Row
    released: bool = False
    state8: bool = False
    budget: float | None = None
    lora: bool = False

    @property
    def label(self) -> str:
        return self.row.label

    def load(self) -> None:
        """Load the row's own libraries, as its first step would."""
        if self.row.razor is not None:
            from backrazor.kernels.cpu.entries import entry_point
            from backrazor.kernels.cpu.layout import F32
            from backrazor.warmup import entry_points

            for point in entry_points():
                if not point[2] or point[2][0] == F32:
                    entry_point(*point)
        if self.state8:
            _small_steps(_state8)
        if self.lora:
            import peft  # noqa: F401
        if self.budget is not None:
            _small_steps(_sgd, self.budget)

    def build(self) -> br.memory.Step:
        step = self.row.build()
        if self.lora:
            _add_lora(step.model)
        trained = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
        optimizer = (_state8 if self.state8 else _sgd)(trained)
        if self.released:
            br.memory.GradientRelease(optimizer)
        if self.budget is not None:
            _compile(step.model, self.budget)
        return step._replace(optimizer=optimizer)


def cases(backbone: str) -> list[Case]:
    found = [
        Case(Row(backbone, "dense")),
        Case(Row(backbone, "checkpointing by block", checkpointing="block")),
        Case(Row(backbone, "micro-batches of 1", micro=1)),
        *(Case(Row(backbone, f"compile, budget {budget:g}"), budget=budget) for budget in BUDGETS),
        Case(Row(backbone, "compact 0.97, compile", razor=("compact", 0.97)), budget=1.0),
    ]
    if backbone == "vit_b16":
        found.append(Case(Row(backbone, "LoRA"), lora=True))
    for sparsity in (0.97, 0.99):
        row = Row(backbone, f"compact {sparsity}, released", razor=("compact", sparsity))
        found.append(Case(row, released=True))
    eight = Row(backbone, "compact 0.97, released, 8-bit state", razor=("compact", 0.97))
    found.append(Case(eight, released=True, state8=True))
    images = Row(backbone, "").images
    for micro in (images // 2, images // 4):
        label = f"compact 0.97, micro-batches of {micro}"
        found.append(Case(Row(backbone, label, razor=("compact", 0.97), micro=micro)))
    return found


def measure(case: Case) -> dict[str, float]:
    """The row's figures, MB, of this process."""
    torch.set_num_threads(1)
    _small_steps(_sgd)
    bare = _settled()
    case.load()
    loaded = _settled()
    step = case.build()
    for _ in range(2):
        _run(step, keep=False)
    gc.collect()
    reset_high_water_mark()
    _run(step, keep=False)
    ordinary = high_water_mark()
    _run(step, keep=True)
    parameters = list(step.model.parameters())
    parts = {
        "weights_MB": br.memory.weight_bytes(step.model),
        "gradients_MB": sum(p.grad.nbytes for p in parameters if p.grad is not None),
        "optimizer_MB": br.memory.state_bytes(step.optimizer),
    }
    gc.collect()
    resident = reset_high_water_mark()
    _run(step, keep=True)
    parts["peak_MB"] = high_water_mark() - resident
    figures = {
        "above_bare_MB": ordinary - bare,
        "above_loaded_MB": ordinary - loaded,
        "libraries_MB": loaded - bare,
        **parts,
        "parts_MB": sum(parts.values()),
        "bare_MB": bare,
    }
    return {name: round(value / 1e6, 1) for name, value in figures.items()}


def _run(step: br.memory.Step, keep: bool) -> None:
    """One step; ``keep``: gradients stay allocated, else the next forward finds none."""
    step.forward().backward()
    step.optimizer.step()
    step.model.zero_grad(set_to_none=not keep)


def _settled() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes()


def _sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)


def _state8(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return bitsandbytes_optimizers().SGD8bit(parameters, lr=1e-4, momentum=0.9)


def _small_steps(optimizer_of, budget: float | None = None) -> None:
    """What libraries load at a network's first step; the Linear is large enough for a state at 8 bits."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.Flatten(), nn.Linear(144, 64))
    optimizer = optimizer_of(list(model.parameters()))
    if budget is not None:
        _compile(model, budget)
    for _ in range(2):
        F.cross_entropy(model(torch.randn(2, 3, 8, 8)), torch.tensor([0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()


def _compile(model: nn.Module, budget: float) -> None:
    import torch._functorch.config

    torch._functorch.config.activation_memory_budget = budget
    model.compile()


def _add_lora(model: nn.Module) -> None:
    """peft's adapters of rank 8 at every Linear of the blocks; the head trains whole."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=8, lora_alpha=16, target_modules=["qkv", "proj", "fc1", "fc2"])
    inject_adapter_in_model(config, model)
    model.head.requires_grad_(True)


def table(results: pandas.DataFrame) -> pandas.DataFrame:
    """The newest line of each row, and how much less than dense it holds."""
    newest = results.drop_duplicates(["backbone", "row"], keep="last")
    dense = newest[newest["row"] == "dense"].set_index("backbone")
    shown = newest[["backbone", "row", "batch"]].copy()
    for name in ("above_bare", "above_loaded", "parts"):
        column = f"{name}_MB"
        shown[column] = newest[column]
        shown[f"dense / {name}"] = (newest["backbone"].map(dense[column]) / newest[column]).round(2)
    return shown


def figures(results: pandas.DataFrame, path: Path) -> list[Path]:
    """Stacked bars of ``FIGURE_ROWS``, a file per backbone; of the compiled rows the one that holds least."""
    newest = results.drop_duplicates(["backbone", "row"], keep="last")
    made = []
    for backbone, part in newest.groupby("backbone", sort=False):
        bars = {}
        for label in FIGURE_ROWS:
            found = part[part["row"].str.startswith(label)]
            if len(found):
                line = found.loc[found["parts_MB"].idxmin()]
                bars[line["row"]] = {name: line[name.replace("_mb", "_MB")] for name in PART_COLUMNS}
        file = path.with_name(f"{path.stem}-{backbone}.png")
        made.append(memory_by_part(bars, file, f"{backbone}, batch {part['batch'].iloc[0]}, float32"))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=BACKBONES, choices=BACKBONES)
    parser.add_argument("--rows", nargs="+", help="labels")
    parser.add_argument("--results", type=Path, default=RESULTS / "whole_process.csv")
    parser.add_argument("--figure", action="store_true", help="measure nothing")
    options = parser.parse_args()
    for case in [] if options.figure else [case for name in options.backbones for case in cases(name)]:
        if options.rows is not None and case.label not in options.rows:
            continue
        known = pandas.read_csv(options.results) if options.results.exists() else None
        name = {"backbone": case.row.backbone, "row": case.label, "batch": case.row.images}
        if known is not None and ((known["backbone"] == name["backbone"]) & (known["row"] == name["row"])).any():
            continue
        found = in_fresh_process(measure, case, stable_malloc=True)
        print(name | found, flush=True)
        append_rows(options.results, [name | found], circumstances("python benchmarks/whole_process.py"))
    results = pandas.read_csv(options.results)
    print(table(results).to_markdown(index=False))
    figures(results, options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
