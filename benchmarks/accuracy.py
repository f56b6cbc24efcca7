"""Accuracy after fine-tuning with Back Razor beside dense: a small ViT from upright to turned digits.

    python benchmarks/accuracy.py        # three seeds; rows that benchmarks/results/accuracy.csv has are not run again
    python benchmarks/accuracy.py --seeds 0 --configs dense

A ViT of 2.7 M parameters (32 pixels, patch 8) is trained from scratch on 797 of scikit-learn's digits, then fine-tuned,
all of it, to the same images turned by 90 degrees: once per configuration, from the same weights, in the same order of
batches. Every accuracy is of the same 1,000 test images. Writes docs/accuracy.md from the CSV.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pandas as pd
from _circumstances import append_rows, circumstances
from _digits import SCRATCH_EPOCHS, Digits, accuracy, fit, from_scratch, load

import backrazor as br
from razorlab.tables import wrap

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/accuracy.csv"
CONFIGS = {
    "dense": None,
    "compact 0.9": br.RazorConfig.compact(0.9),
    "compact 0.97": br.RazorConfig.compact(0.97),
    "paper 0.9": br.RazorConfig.paper(0.9),
}
TUNING_EPOCHS, TUNING_RATE = 25, 5e-4


def tune(seed: int, name: str, digits: Digits) -> dict[str, object]:
    """One row: accuracies before and after fine-tuning to the turned digits."""
    model = from_scratch(digits, seed)
    x, test_x = (images.rot90(1, (2, 3)) for images in (digits.x, digits.test_x))
    row = {
        "configuration": name,
        "seed": seed,
        "upright": accuracy(model, digits.test_x, digits.test_y),
        "turned_before": accuracy(model, test_x, digits.test_y),
    }
    start = time.perf_counter()
    if CONFIGS[name] is not None:
        br.razor_(model, CONFIGS[name])
    check = None if CONFIGS[name] is None else br.check_finite
    loss = fit(model, x, digits.y, TUNING_EPOCHS, TUNING_RATE, seed, check)
    row |= {"turned_after": accuracy(model, test_x, digits.test_y), "training_loss": loss}
    row |= {"test_images": len(test_x), "scratch_epochs": SCRATCH_EPOCHS, "tuning_epochs": TUNING_EPOCHS}
    row["seconds"] = time.perf_counter() - start
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def markdown(table: pd.DataFrame) -> str:
    """The page: one row per configuration, mean and spread over seeds, and the difference to dense seed by seed."""
    dense = table[table.configuration == "dense"].set_index("seed").turned_after
    rows = []
    for name, part in table.groupby("configuration", sort=False):
        after = part.set_index("seed").turned_after
        rows.append(
            {
                "configuration": name,
                "seeds": len(part),
                "accuracy, %": f"{after.mean():.2f}" + (f" ± {after.std():.2f}" if len(after) > 1 else ""),
                "by seed": ", ".join(f"{value:.1f}" for value in after.sort_index()),
                "minus dense, points": f"{(after - dense).mean():+.2f}",
            }
        )
    first = table.iloc[0]
    upright = table.drop_duplicates("seed")
    text = [
        "# Accuracy after fine-tuning",
        wrap(
            "A ViT of 2.7 M parameters (32 pixels, patch 8, width 192, 6 blocks, 6 heads) is trained from scratch on "
            f"797 of scikit-learn's digits for {first.scratch_epochs} epochs. It reaches {upright.upright.mean():.1f}% "
            f"on {first.test_images:,} test images. Then all its parameters are fine-tuned for {first.tuning_epochs} "
            "epochs to the same images turned by 90 degrees, where it starts at "
            f"{upright.turned_before.mean():.1f}%. Every configuration starts from the same weights and sees the same "
            f"batches. A point of accuracy is {first.test_images / 100:.0f} images. The spread is the standard "
            "deviation over seeds."
        ),
        wrap(
            f"Made by `python benchmarks/accuracy.py` on two CPU cores ({first.date}, commit {first.commit}, torch "
            f"{first.torch}). The rows are in `benchmarks/results/accuracy.csv`."
        ),
        pd.DataFrame(rows).to_markdown(index=False),
    ]
    return "\n\n".join(text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS), choices=CONFIGS)
    options = parser.parse_args()
    digits = load()
    for seed in options.seeds:
        for name in options.configs:
            known = pd.read_csv(RESULTS) if RESULTS.exists() else pd.DataFrame(columns=["configuration", "seed"])
            if ((known.configuration == name) & (known.seed == seed)).any():
                continue
            row = tune(seed, name, digits)
            print(row, flush=True)
            append_rows(RESULTS, [row], circumstances("python benchmarks/accuracy.py"))
    table = pd.read_csv(RESULTS)
    order = {name: place for place, name in enumerate(CONFIGS)}
    table = table.sort_values(
        ["configuration", "seed"], key=lambda column: column.map(lambda value: order.get(value, value))
    )
    (ROOT / "docs/accuracy.md").write_text(markdown(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
