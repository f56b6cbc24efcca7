"""The text of ``train.py --help``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from transfer.settings import KEYS

MOST_NAMES = 20  # of a group that are spelt in one line


def offered(group: str, names: Sequence[str], separator: str = ", ") -> str:
    """Return what ``group`` offers: the names, or of many that lie in sub-folders a count per folder."""
    if len(names) <= MOST_NAMES:
        return separator.join(names)
    counts = Counter(name.partition("/")[0] for name in names)
    tables = separator.join(f"{folder}/ ({count})" for folder, count in counts.items())
    return f"{tables}; `ls configs/{group}/*` lists them"


def help_text(groups: Mapping[str, list[str]]) -> str:
    """Return the text of ``train.py --help``.

    Args:
        groups: the configuration groups and the names that each offers.
    """
    lines = [
        "Fine-tune a pretrained image classifier, with the activations kept for backward pruned.",
        "",
        "  python train.py model=efficientnet_lite0 data=digits razor.sparsity=0.9",
        "  python train.py experiment=demo/compact90          one of the committed experiments",
        "  python train.py -m seed=1,2,3                      one run for each value",
        "  python train.py --cfg job                          print the configuration and stop",
        "",
        "Groups (group=name):",
    ]
    lines += [f"  {group:<11} {offered(group, names)}" for group, names in groups.items()]
    lines += ["", "Keys (key=value):"]
    for key in KEYS:
        lines.append(f"  {key.path:<28} {key.allowed}")
        lines.append(f"  {'':<28}   {key.help}")
    lines += ["", "A wrong value ends with exit code 2 and one line; HYDRA_FULL_ERROR=1 shows the traceback."]
    return "\n".join(lines)
