"""Which layer keeps what for backward, dense and razored; what batch or sparsity fits a memory budget.

    python -m razorlab profile model=vit_b16 batch=16 razor.sparsity=0.9
    python -m razorlab profile model=timm model.name=convnext_atto.d2_in1k rows=all
    python -m razorlab profile model=vit_b16 batch=64 budget=24GiB                     what batch fits
    python -m razorlab profile model=vit_b16 batch=64 budget=4GiB razor.sparsity=auto  what sparsity fits

Its own keys: batch (images per forward), image_size (pixels), classes, rows (layers shown, or all), budget (a size such
as 24GiB; of a whole step: weights, gradients, optimizer state, input and peak). Every other key=value is train.py's.
All figures are predicted from shapes: nothing is trained, no weights are needed. MB = 1e6 bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from razorlab import schema
from razorlab.composition import compose_config
from razorlab.errors import UserError, one_line
from razorlab.memory_profile import StepProfile, layer_table, need_table, parse_size
from razorlab.pairs import with_recipe
from razorlab.schema import MIN_IMAGE_SIZE
from razorlab.settings import validate

OWN = {"batch": "8", "image_size": "224", "classes": "1000", "rows": "30", "budget": ""}
AUTO = "razor.sparsity=auto"


def split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return this command's own keys with their values, and what goes to the configuration."""
    own, overrides = dict(OWN), []
    for argument in arguments:
        name, sign, value = argument.removeprefix("--").partition("=")
        if name in OWN:
            if not sign:
                raise UserError(f"{argument} needs a value: write {name}={OWN[name] or '24GiB'}")
            own[name] = value
        else:
            overrides.append(argument)
    return own, overrides


def whole(own: dict[str, str], name: str, least: int, most: int) -> int:
    """Return one of this command's own keys as a number.

    Raises:
        UserError: it is no whole number from ``least`` to ``most``.
    """
    text = own[name]
    if not text.isdecimal() or not least <= int(text) <= most:
        raise UserError.value(name, text, f"a whole number from {least} to {most}")
    return int(text)


def composed(overrides: Sequence[str]) -> schema.Config:
    """Return the configuration of ``overrides``, validated, as plain values; weights are random."""
    config = compose_config(["model.pretrained=false", *with_recipe(overrides)])
    config["data"]["root"] = "."  # no data is read
    return validate(config)


def report(arguments: Sequence[str]) -> None:
    """Print what ``arguments`` ask for.

    Raises:
        UserError: a value is wrong.
    """
    own, overrides = split(arguments)
    batch = whole(own, "batch", 1, 1 << 20)
    size, classes = whole(own, "image_size", MIN_IMAGE_SIZE, 1024), whole(own, "classes", 1, 1 << 20)
    rows = None if own["rows"] == "all" else whole(own, "rows", 1, 1 << 20)
    budget = parse_size("budget", own["budget"]) if own["budget"] else None
    automatic = AUTO in overrides
    if automatic and budget is None:
        raise UserError(f"{AUTO} needs a budget: write budget=24GiB")
    # a transformer is built for one size, so the network has to know it; a data.image_size= of the user's wins
    sizes = [f"data.image_size={size}", "trainer.measure.image_size=null"]
    config = composed([*sizes, *(text for text in overrides if text != AUTO)])
    size = config["data"]["image_size"]
    profile = StepProfile(config, classes, size)
    sparsity = profile.razor.sparsity if profile.razor is not None else None
    if automatic and budget is not None:
        sparsity = profile.least_sparsity(budget, batch)
        print(f"razor.sparsity={sparsity:g} is the smallest (in hundredths) whose step fits {own['budget']}\n")
    title = f"{config['model']['name']}, batch {batch}, {size} px, {config['trainer']['precision']}"
    if sparsity is not None:
        title += f", {config['razor']['name']} at sparsity {sparsity:g}"
    table = layer_table(profile, batch, sparsity, rows)  # first, for it may end in an error
    print(f"{title}\n\n{table}\n")
    print(need_table(profile, batch, sparsity))
    if budget is not None:
        print("\n".join(budget_lines(profile, budget, own["budget"], sparsity)))


def budget_lines(profile: StepProfile, budget: int, text: str, sparsity: float | None) -> list[str]:
    """Return the largest batch that fits ``budget`` bytes, a line for each network."""
    labels = {"dense": None} | ({"razored": sparsity} if sparsity is not None else {})
    lines = []
    for label, at in labels.items():
        batch = profile.largest_batch(budget, at)
        if batch:
            lines.append(f"{label}: batch {batch} fits {text} ({profile.need(batch, at) / 1e6:.1f} MB in all)")
        else:
            lines.append(f"{label}: nothing fits {text}, one image needs {profile.need(1, at) / 1e6:.1f} MB in all")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        report(arguments)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_line(error)) from error
    return 0
