"""The text of ``train.py --help``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from razorlab.keys import REQUIRED, Key
from razorlab.schema import KEYS

MOST_NAMES = 20  # of a group that are spelt in one line


def offered(group: str, names: Sequence[str], separator: str = ", ") -> str:
    """Return what ``group`` offers: the names, or of many that lie in sub-folders a count per folder."""
    if len(names) <= MOST_NAMES:
        return separator.join(names)
    example = next(name for name in names if "/" in name)
    if group == "recipe":
        return f"none{separator}a pair such as {example}; `python train.py --list {group}` lists them"
    counts = Counter(name.partition("/")[0] for name in names)
    tables = separator.join(f"{folder}/ ({count})" for folder, count in counts.items())
    return f"{tables}; `python train.py --list {group}` lists them"


def help_text(groups: Mapping[str, list[str]]) -> str:
    """Return the text of ``train.py --help``.

    Args:
        groups: the configuration groups and the names that each offers.
    """
    lines = [
        "Fine-tune a pretrained image classifier, with the activations kept for backward pruned.",
        "",
        "  python train.py model=efficientnet_lite0 data=digits razor.sparsity=0.9",
        "  python train.py model=vit_b16 data=cifar100        with the paper's recipe for this pair",
        "  python train.py experiment=demo/compact90          one of the committed experiments",
        "  python train.py -m seed=1,2,3                      one run for each value",
        "  python train.py --cfg job                          print the configuration and stop",
        "  python train.py --list experiment                  a line for each option of a group",
        "",
        "Groups (group=name):",
    ]
    lines += [f"  {group:<11} {offered(group, names)}" for group, names in groups.items()]
    lines += ["", *recipe_lines(groups["recipe"]), "", "Keys (key=value):"]
    for key in KEYS:
        lines.append(f"  {key.path:<28} {key.allowed}{default_of(key)}")
        lines.append(f"  {'':<28}   {key.help}")
    lines += ["", "A wrong value ends with exit code 2 and one line; HYDRA_FULL_ERROR=1 shows the traceback."]
    return "\n".join(lines)


def default_of(key: Key) -> str:
    """Say what ``key`` is where nothing sets it; the choice of a group's file is that of configs/train.yaml."""
    if key.default == REQUIRED or (key.default is None and key.optional):
        return ""
    shown = str(key.default).lower() if isinstance(key.default, bool) else key.default
    return f"; default {shown}"


def recipe_lines(names: Sequence[str]) -> list[str]:
    """Say when a recipe applies, and for which backbones and data sets there is one."""
    data: dict[str, list[str]] = {}
    for model, _, name in (text.partition("/") for text in names if "/" in text):
        data.setdefault(model, []).append(name)
    of: dict[str, list[str]] = {}
    for model, sets in data.items():
        of.setdefault(", ".join(sets), []).append(model)
    return [
        "A backbone and a data set that are named without an experiment take the recipe for that pair, which the log",
        "names. Every key overrides it; recipe=none takes the plain defaults of the groups. There is one for",
        *(f"  {' or '.join(models)} on {sets}" for sets, models in of.items()),
    ]
