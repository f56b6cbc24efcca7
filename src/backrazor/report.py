"""What ``razor_`` did, for a person to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from .codecs.rest import SMALLEST
from .config import RazorConfig
from .nn import DropIn
from .nn.netted import packs_the_rest
from .rules import Configs

_FULL = ("float32", "dense")


@dataclass(frozen=True)
class Replaced:
    """A module that became a drop-in: its name, both classes, what it keeps for backward, its configuration, and the
    pattern that chose that one, if there was one."""

    name: str
    original: str
    replacement: str
    keeps: str
    config: RazorConfig
    pattern: str | None = None


@dataclass(frozen=True)
class Left:
    """A module that stayed as it was, and why."""

    name: str
    type: str
    reason: str


@dataclass
class Report:
    """What ``razor_`` did.

    Attributes:
        config: what it was given.
        replaced: the modules that became drop-ins.
        left: the modules that did not, and why.
        lowered: every precision that is lowered in the model as it stands now, in words.
        fused: how many chains of layers run as one operator.
        earlier_kept: names of drop-ins of an earlier ``razor_`` that stayed as they were.
        earlier_renewed: names of those that were converted anew.
        earlier_turned_back: names of those that are plain layers now; ``left`` says why.
    """

    config: Configs
    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    lowered: list[str] = field(default_factory=list)
    fused: int = 0
    earlier_kept: list[str] = field(default_factory=list)
    earlier_renewed: list[str] = field(default_factory=list)
    earlier_turned_back: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Lines for a person: what was replaced (by class and pattern), what was left and why, what became of earlier
        drop-ins, which precisions were lowered."""
        lines = list(self._heading())
        groups = Counter((row.original, row.pattern, row.keeps) for row in self.replaced)
        for (original, pattern, keeps), count in groups.items():
            chosen = "" if pattern is None else f" by {pattern!r}"
            lines.append(f"  {count:4d} x {original}{chosen}: keeps {keeps}")
        if self.fused:
            chains = "convolution, frozen norm and activation, or Linear and activation"
            lines.append(f"  {self.fused:4d} x a chain as one operator: {chains}")
        lines += [f"  left {row.name} ({row.type}): {row.reason}" for row in self.left]
        lines += self._earlier()
        lines += [f"  precision: {line}" for line in self.lowered]
        return "\n".join(lines)

    __str__ = table

    def _heading(self) -> Iterator[str]:
        if not isinstance(self.config, Mapping):
            yield f"razored with {self.config.describe()}"
            return
        yield "razored by patterns, of which the first that matches decides"
        for pattern, config in self.config.items():
            yield f"  {pattern!r}: {'dense' if config is None else config.describe()}"

    def _earlier(self) -> list[str]:
        fates = {
            "kept as they were": self.earlier_kept,
            "converted anew": self.earlier_renewed,
            "turned back": self.earlier_turned_back,
        }
        words = [f"{len(names)} {fate} ({_shortened(names)})" for fate, names in fates.items() if names]
        return [f"  drop-ins of an earlier razor_: {', '.join(words)}"] if words else []


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name or "the model" for name in names[:3]) + more


def lowered(model: nn.Module) -> list[str]:
    """Every precision that is lowered in ``model``, in words: of what its drop-ins keep, and of nothing else."""
    found: dict[str, Counter[str]] = {}
    for module in model.modules():
        if isinstance(module, DropIn):
            for subject, stored in dict.fromkeys(_stored(module)):
                found.setdefault(subject, Counter())[stored] += 1
    lines = []
    for subject, counts in found.items():
        for stored, count in counts.items():
            where = f" in {count} of {counts.total()} layers" if len(counts) > 1 else ""
            lines += [] if stored in _FULL else [f"{subject} stored in {stored}{where}"]
    if any(map(packs_the_rest, model.modules())):
        lines.append(f"what else autograd keeps is stored in int8, from {SMALLEST} elements on")
    return lines


def _stored(module: DropIn) -> Iterator[tuple[str, str]]:
    """What a drop-in keeps and the word for how it is stored, by the rules that it uses."""
    rules = module.razor
    for name in module.rules_used(module):
        if name == "activation":
            what = "input" if rules.activation == "float16" else "derivative"
            yield f"the {what} of smooth activations is", str(module.stored_as)
        elif name == "norm" and rules.norm.kind != "pruned":
            yield "the input of normalisation is", rules.norm.kind
        elif name == "attention" and rules.attention.rule != "pruned":
            yield "q, k and v of attention are", rules.attention.rule
        else:
            pruned = {"norm": rules.norm.pruned, "attention": rules.attention.pruned}.get(name) or rules.pruned
            yield "kept values are", pruned.values
