"""Converting a model in place, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from .codecs import Pruned
from .codecs.normalised import NormCodec
from .config import RazorConfig
from .functional import AttentionCodec
from .kernels.topk.reference import NON_FINITE, OVERFLOW
from .nn import DROP_INS, STAYS, WINDOWED, drop_in_for, qualified_name
from .nn.attention import RazorMultiheadAttention, SdpaDropIn
from .nn.base import (
    DropIn,
    LayerRules,
    attach,
    class_given_to,
    detach,
    is_patched,
    status_flags,
    why_not_detached,
)
from .nn.fusion import Linked, link_chains, linked, unlink

_ATTENTION = (SdpaDropIn, RazorMultiheadAttention)


@dataclass(frozen=True)
class Replaced:
    """A module that became a drop-in: its name, both classes, and what it keeps for backward."""

    name: str
    original: str
    replacement: str
    keeps: str


@dataclass(frozen=True)
class Left:
    """A module that stayed as it was, and why."""

    name: str
    type: str
    reason: str


@dataclass
class Report:
    """What ``razor_`` did."""

    config: RazorConfig
    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    lowered: list[str] = field(default_factory=list)
    fused: int = 0

    def table(self) -> str:
        """Lines for a person: what was replaced (by class), what was left and why, which precisions were lowered."""
        groups: dict[tuple[str, str], int] = {}
        for row in self.replaced:
            key = row.original, row.keeps
            groups[key] = groups.get(key, 0) + 1
        lines = [f"razored with {self.config.describe()}"]
        lines += [f"  {count:4d} x {original}: keeps {keeps}" for (original, keeps), count in groups.items()]
        if self.fused:
            chains = "convolution, frozen norm and activation, or Linear and activation"
            lines.append(f"  {self.fused:4d} x a chain as one operator: {chains}")
        lines += [f"  left {row.name} ({row.type}): {row.reason}" for row in self.left]
        lines += [f"  precision: {line}" for line in self.lowered]
        return "\n".join(lines)

    __str__ = table


def razor_(
    model: nn.Module, config: RazorConfig | None = None, filter_fn: Callable[[str, nn.Module], bool] | None = None
) -> Report:
    """Convert ``model`` in place so that backward works from pruned activations; returns a report.

    Parameters, buffers, state_dict keys, hooks and modes are untouched; the forward pass computes what it computed
    before, bit for bit.

    Args:
        model: any module; a model that is razored already is converted anew.
        config: defaults to ``RazorConfig()``, the compact preset at sparsity 0.9.
        filter_fn: called with (qualified name, module); only modules for which it returns True are converted.

    Raises:
        TypeError: ``model`` or ``config`` is of another type.
        ValueError: nothing in the model could be converted.
    """
    config = RazorConfig() if config is None else config
    if not isinstance(model, nn.Module):
        raise TypeError(f"razor_ takes a torch.nn.Module, not {type(model).__name__}")
    if not isinstance(config, RazorConfig):
        raise TypeError(f"config takes a RazorConfig, not {type(config).__name__}: use RazorConfig(sparsity=...)")
    unrazor_(model)
    report = Report(config)
    head = _head_name(model)
    has_convolution = any(isinstance(module, nn.Conv2d) for module in model.modules())
    ends = transformer_ends(model)
    windowed = _windowed(model)
    for name, module in list(model.named_modules()):
        cls = drop_in_for(module)
        reason = None
        if cls is None:
            reason = _why_it_stays(module, is_root=module is model)
        elif is_patched(module):
            reason = "its forward is replaced on the instance, so that of the drop-in would not run"
        elif filter_fn is not None and not filter_fn(name, module):
            reason = "left out by filter_fn"
        else:
            rules = _rules(config, module, is_head=name == head, is_end=name in ends, cnn=has_convolution and not ends)
            reason = cls.refusal(module, rules)
            if name in ends and config.values == "paper":
                reason = "the paper leaves both ends of a transformer dense"
            if id(module) in windowed and config.sparsity > 0 and (cls.prunes or rules.attention.rule == "pruned"):
                reason = reason or "inside window attention: index 0 counts windows, not images"
            if reason is None:
                report.replaced.append(Replaced(name, type(module).__name__, cls.__name__, cls.keeps(module, rules)))
                attach(module, cls, rules)
        if reason is not None:
            report.left.append(Left(name, type(module).__name__, reason))
    if not report.replaced:
        known = ", ".join(sorted(key.rsplit(".", 1)[1] for key in DROP_INS))
        raise ValueError(
            f"nothing in {type(model).__name__} was converted: no module is one of {known} and passes filter_fn"
        )
    report.fused = link_chains(model)
    report.lowered = _lowered(config)
    return report


def unrazor_(model: nn.Module) -> int:
    """The exact way back, in place; returns how many modules were turned back.

    Parametrizations (``torch.nn.utils.parametrize``) that were registered after ``razor_`` stay.

    Raises:
        RuntimeError: a module was changed after ``razor_`` in a way that the way back would break; the message names it
            and what to do, and nothing has been touched.
    """
    drop_ins = [module for module in model.modules() if isinstance(module, DropIn)]
    containers = [module for module in model.modules() if isinstance(module, Linked)]
    for name, module in model.named_modules():
        base: type[nn.Module] | None = None
        if isinstance(module, DropIn):
            base = class_given_to(module)
        elif isinstance(module, Linked):
            base = linked(module._backrazor_linked)
        reason = None if base is None else why_not_detached(module, base)
        if reason is not None:
            raise RuntimeError(f"{name or type(module).__name__} cannot be turned back: {reason}")
    for module in drop_ins:
        detach(module)
    for module in containers:
        unlink(module)
    return len(drop_ins)


def check_finite(model: nn.Module) -> None:
    """Stop on bad numbers: call it after ``backward`` and before the optimizer steps. One device read for the whole
    model.

    Raises:
        FloatingPointError: a packed activation held NaN or Inf, or a value too large for its stored type. Names the
            layers; the flags are
            cleared, so that the caller may skip the step and go on.
    """
    flags = [(name, flag) for name, module in model.named_modules() for flag in status_flags(module)]
    if not flags:
        return
    known = NON_FINITE | OVERFLOW
    status = [bits & known for bits in torch.cat([flag.to(flags[0][1].device) for _, flag in flags]).tolist()]
    if not any(status):
        return
    for _, flag in flags:
        flag.zero_()
    problems = []
    for bit, words in (
        (NON_FINITE, "NaN or Inf in the input of"),
        (OVERFLOW, "values too large for their stored type in"),
    ):
        names = [name or type(model).__name__ for (name, _), bits in zip(flags, status, strict=True) if bits & bit]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{words} {', '.join(names[:3])}{more}")
    hint = (
        "" if not any(bits & OVERFLOW for bits in status) else "; use values='bfloat16' or 'float32' for a wider range"
    )
    raise FloatingPointError("; ".join(problems) + hint)


def _head_name(model: nn.Module) -> str | None:
    """Name of the classifier: the last Linear in module order."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return names[-1] if names else None


def transformer_ends(model: nn.Module) -> set[str]:
    """Names of the patch convolution, the final norm and the classifier of a network with attention; else empty.

    The first sees images, the last one token or their mean: together below 2% of the bytes, and most of the gradient,
    so neither is pruned (docs/gradients.md).
    """
    names, modules = zip(*model.named_modules(), strict=True)
    drop_ins = dict(zip(names, map(drop_in_for, modules), strict=True))
    attention = [i for i, cls in enumerate(drop_ins.values()) if cls and issubclass(cls, _ATTENTION)]
    if not attention:
        return set()
    ends = [
        name for name, module in zip(names, modules[: attention[0]], strict=False) if isinstance(module, nn.Conv2d)
    ][:1]
    # behind the last attention: a part of the model, or of a part of it that is no layer with a drop-in of its own
    behind = [
        (name, module)
        for name, module in zip(names[attention[-1] :], modules[attention[-1] :], strict=True)
        if name.count(".") <= 1 and name and drop_ins[name.rpartition(".")[0]] is None
    ]
    for kind in (nn.LayerNorm, nn.Linear):
        ends += [name for name, module in behind if isinstance(module, kind)][-1:]
    return set(ends)


def _windowed(model: nn.Module) -> set[int]:
    """Ids of the modules whose inputs are windows, not images."""
    found = ((module, WINDOWED.get(qualified_name(type(module)))) for module in model.modules())
    return {id(part) for module, name in found if name is not None for part in module.get_submodule(name).modules()}


def _why_it_stays(module: nn.Module, is_root: bool) -> str | None:
    """What to say of a module without a drop-in; None where it keeps nothing, or its parts say it all."""
    cls = type(module)
    if qualified_name(cls) in STAYS:
        return STAYS[qualified_name(cls)]
    if not any(True for _ in module.children()):
        return "no drop-in for this class"
    if _is_attention(cls) and not any(_is_attention(type(part)) for part in module.modules() if part is not module):
        return "attention of a class without a drop-in: its product stays dense"
    own = [name for name, parameter in module.named_parameters(recurse=False) if parameter.requires_grad]
    if own and not is_root:
        return f"uses its own {', '.join(own)} itself: what that keeps stays dense"
    return None


def _is_attention(cls: type[nn.Module]) -> bool:
    """By name: libraries have dozens of attention classes."""
    return "Attention" in cls.__name__ or "Attn" in cls.__name__


def _rules(config: RazorConfig, module: nn.Module, is_head: bool, is_end: bool, cnn: bool) -> LayerRules:
    """The configuration resolved for one layer; ``is_end``: one of ``transformer_ends``."""
    sparsity = 0.0 if is_end else config.sparsity
    if is_head and config.head_sparsity is not None:
        sparsity = config.head_sparsity
    values = config.values
    if values == "paper":
        values = "float16"
        if isinstance(module, nn.Conv2d):
            values = "float32"
        elif is_head and cnn:
            values = "int8"
    pruned = Pruned(sparsity, values, config.index)
    norm_values = "float32" if config.values == "paper" else values
    norm = NormCodec(config.norm, replace(pruned, values=norm_values))
    return LayerRules(pruned, norm, config.activation, AttentionCodec(config.attention, pruned))


def _lowered(config: RazorConfig) -> list[str]:
    """Every precision that the configuration lowers, in words."""
    lines = []
    if config.values == "paper":
        lines.append("kept values: float32 in convolutions, float16 in Linear and attention, int8 in the head of a CNN")
    elif config.values != "float32":
        lines.append(f"kept values are stored in {config.values}")
    if config.attention in ("int8", "int4"):
        lines.append(f"q, k and v of attention are stored in {config.attention}")
    if config.norm in ("bfloat16", "int8", "int4"):
        lines.append(f"the input of normalisation is stored in {config.norm}")
    if config.activation != "dense":
        what = "input" if config.activation == "float16" else "derivative"
        lines.append(f"the {what} of smooth activations is stored in {config.activation}")
    return lines
