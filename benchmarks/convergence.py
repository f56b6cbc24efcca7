"""The gradient's error along a run, and what it does to the loss: dense, zero fill, mean fill.

    python benchmarks/convergence.py            # CPU; appends to benchmarks/results/convergence.csv
    python benchmarks/convergence.py --steps 20

EfficientNet-Lite0 starts from its ImageNet weights on digits at 64 px, batch norm frozen, SGD without momentum at one
rate, so that nothing but the gradient differs. Every run trains on its own gradients, over the same batches. Every
few steps its gradient is compared with the dense one at the same weights: on one batch of 16 images, and on 96, over
which the samples' own errors average out: what is left is their mean, the bias. docs/method.md says what a
theorem asks of the latter.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from _backbones import ROOT, build, freeze
from _circumstances import append_rows, circumstances, command_line
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import backrazor as br

RESULTS = ROOT / "benchmarks/results/convergence.csv"
BATCH, MANY, SIDE, RATE = 16, 96, 64, 3e-3
SPARSITIES = (0.9, 0.97)


def configurations() -> dict[str, br.RazorConfig | None]:
    """By name; None is the dense run. Zero and mean differ in what is read for a dropped element alone."""
    chosen: dict[str, br.RazorConfig | None] = {"dense": None}
    for sparsity in SPARSITIES:
        zero = br.RazorConfig.paper(sparsity)
        chosen |= {f"zero {sparsity:g}": zero, f"mean {sparsity:g}": br.RazorConfig.paper(sparsity, fill="mean")}
    return chosen


def digits(size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches: (size, 3, 64, 64) and labels (size,)."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    order = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(x), generator=order).split(size):
            if len(index) == size:
                image = F.interpolate(x[index], SIDE, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
                yield image, torch.tensor(labels)[index]


def error(model: nn.Module, x: Tensor, y: Tensor, config: br.RazorConfig | None) -> tuple[float, float, float]:
    """Of the gradient at ``config`` beside the dense one: |difference| / |dense|, their cosine, and the loss in nats.
    ``model`` is plain and stays as it is."""
    if config is None:
        with torch.no_grad():
            return 0.0, 1.0, F.cross_entropy(model(x), y).item()
    compared = br.compare_gradients(model, x, lambda logits: F.cross_entropy(logits, y), config)
    cosine, norm = compared.overall.cosine, compared.overall.relative_norm
    return max(1 + norm**2 - 2 * norm * cosine, 0.0) ** 0.5, cosine, compared.dense_loss


def course(
    model: nn.Module,
    config: br.RazorConfig | None,
    batches: Iterator[tuple[Tensor, Tensor]],
    one: tuple[Tensor, Tensor],
    many: tuple[Tensor, Tensor],
    steps: int,
    every: int,
) -> list[dict[str, float]]:
    """Train ``model``, which is plain, for ``steps`` steps under ``config``; a row before the first step and after
    every ``every``.

    Args:
        one, many: images and labels of the batch and of the large batch that errors are measured on.
    """
    rows = []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE)
    for step in range(steps + 1):
        if step % every == 0:
            batch_error, batch_cosine, _ = error(model, *one, config)
            bias, cosine, loss = error(model, *many, config)
            rows.append(
                {"step": step, "loss": loss, "error": batch_error, "cosine": batch_cosine}
                | {"mean_error": bias, "mean_cosine": cosine}
            )
        if step == steps:
            break
        if config is not None:
            br.razor_(model, config)
        x, y = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        br.unrazor_(model)
    return rows


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    backbone = build("efficientnet_lite0", pretrained=True)
    freeze(backbone)
    one, many = next(digits(BATCH, seed=1)), next(digits(MANY, seed=1))
    tables, about = [], circumstances(command_line())
    for name, config in configurations().items():
        model = copy.deepcopy(backbone.model)
        rows = course(model, config, digits(BATCH, seed=0), one, many, options.steps, options.every)
        tables.append(pd.DataFrame([{"configuration": name, **row} for row in rows]))
        print(tables[-1].to_string(index=False, float_format="%.4f"), flush=True)
        append_rows(options.out, tables[-1].to_dict("records"), about)
    table = pd.concat(tables)
    for column in ("loss", "mean_error"):
        print(f"\n{column}\n{table.pivot(index='step', columns='configuration', values=column).round(4)}")


if __name__ == "__main__":
    main()
