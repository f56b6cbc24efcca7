"""Cosine of the gradient to the dense one, for a small ViT trained briefly on scikit-learn's digits.

    python benchmarks/gradients.py     # CPU; writes benchmarks/results/gradients.csv and docs/gradients.md

Three batches of 32: training images, test images, and test images turned by 90 degrees, which are new to the network.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from _circumstances import circumstances
from _digits import SCRATCH_EPOCHS, accuracy, from_scratch, load
from gradients_cnn import summary
from torch import Tensor, nn
from torch.nn import functional as F

import backrazor as br
from razorlab.tables import wrap

ROOT = Path(__file__).parents[1]
SPARSITIES = (0.8, 0.9, 0.95, 0.97, 0.99)
ABLATED = 0.9
CNN = ROOT / "benchmarks/results/gradients_cnn.csv"
EXACT = {"values": "float32", "fill": "zero", "norm": "dense", "activation": "dense", "attention": "dense"}
PRESETS = {
    "pruning alone": lambda s: br.RazorConfig(s, **EXACT),
    "compact": lambda s: br.RazorConfig.compact(s),
    "compact, fill=zero": lambda s: br.RazorConfig.compact(s, fill="zero", values="int8", activation="int2"),
    "paper": lambda s: br.RazorConfig.paper(s),
    "paper, attention int4": lambda s: br.RazorConfig.paper(s, attention="int4"),
}
RULES = (
    ("values", "bfloat16"),
    ("values", "int8"),
    ("values", "int4"),
    ("fill", "mean"),
    ("fill", "known"),
    ("norm", "pruned"),
    ("norm", "int8"),
    ("norm", "int4"),
    ("activation", "int8"),
    ("activation", "int4"),
    ("activation", "int2"),
    ("attention", "pruned"),
    ("attention", "int8"),
    ("attention", "int4"),
)


def configurations() -> dict[tuple[str, float], br.RazorConfig]:
    """By name and sparsity: the presets at every sparsity, and each rule by itself, with and without pruning."""
    found = {(name, s): make(s) for name, make in PRESETS.items() for s in SPARSITIES}
    for field, value in RULES:
        for sparsity in (0.0, ABLATED):
            found[f"{field}={value}", sparsity] = br.RazorConfig(sparsity, **EXACT | {field: value})
    return found


def compare(model: nn.Module, batches: dict[str, tuple[Tensor, Tensor]]) -> pd.DataFrame:
    """One row per configuration, batch and layer, the whole gradient as layer "overall"."""
    rows = []
    for (name, sparsity), config in configurations().items():
        for batch, (x, y) in batches.items():
            comparison = br.compare_gradients(model, x, lambda logits, y=y: F.cross_entropy(logits, y), config)
            for row in (*comparison.by_layer(), comparison.overall):
                about = {"configuration": name, "sparsity": sparsity, "batch": batch, "layer": row.name}
                rows.append(about | {"cosine": row.cosine, "relative_norm": row.relative_norm})
    return pd.DataFrame(rows)


def page(table: pd.DataFrame, score: float, common: dict[str, str]) -> str:
    """docs/gradients.md."""
    overall = table[table.layer == "overall"]
    presets = overall[overall.configuration.isin(PRESETS)]
    by_sparsity = presets.pivot_table(index="configuration", columns="sparsity", values="cosine", sort=False)
    at = presets[presets.sparsity == ABLATED]
    by_batch = at.pivot_table(index="configuration", columns="batch", values="cosine", sort=False)
    layers = table[(table.sparsity == ABLATED) & table.configuration.isin(PRESETS)]
    by_layer = layers.pivot_table(index="layer", columns="configuration", values="cosine", sort=False)
    base = by_sparsity.loc["pruning alone", ABLATED]
    rules = overall[~overall.configuration.isin(PRESETS)]
    rules = rules.pivot_table(index="configuration", columns="sparsity", values="cosine", sort=False)
    rules.columns = ["alone, nothing pruned", f"with pruning at {ABLATED}"]
    rules["cost beside pruning"] = base - rules[f"with pruning at {ABLATED}"]
    text = [
        "# What pruning and quantising cost the gradient",
        wrap(
            "The figures are cosines: of the full parameter gradient to the dense one, with the same weights and the "
            "same batch. The network is a ViT (32 pixels, patch 8, width 192, 6 blocks, 6 heads). It was trained for "
            f"{SCRATCH_EPOCHS} epochs on 797 of scikit-learn's digits, to {score:.1f}% on 1,000 test images. There are "
            "three batches of 32: training images, test images, and test images turned by 90 degrees, which are new "
            "to the network."
        ),
        wrap(
            f"Made by `python benchmarks/gradients.py` on the CPU ({common['date']}, commit {common['commit']}, torch "
            f"{common['torch']}). `benchmarks/results/gradients.csv` has every figure by layer and batch."
        ),
        wrap(
            "*pruning alone* prunes the inputs of Linear and Conv2d. Kept values are float32; norms, activations and "
            "attention stay dense. The quantisers of the other rows come on top of it."
        ),
        "## By sparsity, mean over the batches",
        by_sparsity.to_markdown(floatfmt=".4f"),
        f"## Each rule by itself\n\nPruning alone at {ABLATED} has a cosine of {base:.4f}. A negative cost is a gain.",
        rules.to_markdown(floatfmt=".4f"),
        wrap(
            "A quantised norm gains: the Linear behind it reads its input from the norm's codes and need not prune it. "
            "So does a quantised attention beside a guess, with the projection behind it."
        ),
        f"## By batch, at {ABLATED}",
        by_batch.to_markdown(floatfmt=".4f"),
        f"## By layer, at {ABLATED}, mean over the batches",
        by_layer.to_markdown(floatfmt=".4f"),
        *convolutional(),
    ]
    return "\n\n".join(text) + "\n"


def convolutional() -> list[str]:
    """The section on convolutional networks, from the record of ``gradients_cnn.py`` if there is one."""
    if not CNN.exists():
        return []
    table = pd.read_csv(CNN)
    made = table.iloc[0]
    return [
        "## Convolutional networks",
        wrap(
            "EfficientNet-Lite0 starts from ImageNet weights and has seen 25 steps on digits at 160 px; the others "
            "start at random and have seen 60 steps at 96 px. Batch norm is frozen. Three batches of 16."
        ),
        wrap(
            f"Made by `python benchmarks/gradients_cnn.py` ({made['date']}, commit {made['commit']}). "
            "`benchmarks/results/gradients_cnn.csv` has every layer."
        ),
        summary(table).reset_index().to_markdown(index=False, floatfmt=".3f"),
    ]


def main() -> None:
    """Train, compare, write."""
    digits = load()
    model = from_scratch(digits, seed=0)
    score = accuracy(model, digits.test_x, digits.test_y)
    print(f"test accuracy {score:.2f}% after {SCRATCH_EPOCHS} epochs", flush=True)
    model.train()
    turned = digits.test_x.rot90(1, (2, 3))
    batches = {
        "training": (digits.x[:32], digits.y[:32]),
        "test": (digits.test_x[:32], digits.test_y[:32]),
        "turned": (turned[32:64], digits.test_y[32:64]),
    }
    table, common = compare(model, batches), circumstances("python benchmarks/gradients.py")
    stamped = table.assign(test_accuracy=round(score, 2), epochs=SCRATCH_EPOCHS, **common)
    stamped.to_csv(ROOT / "benchmarks/results/gradients.csv", index=False, float_format="%.5g")
    (ROOT / "docs/gradients.md").write_text(page(table, score, common))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
