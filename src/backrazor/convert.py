"""The verbs: converting a model in place, the way back, and the check for bad numbers.

``rules.py`` decides what each layer gets, ``report.py`` says what was done.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .kernels.topk.layout import NON_FINITE, OVERFLOW
from .nets import nets
from .nn import known_layers
from .nn.base import DropIn, Earlier, attach, class_given_to, detach, devices_of, status_flags, why_not_detached
from .nn.fusion import Linked, link_chains, linked, unlink
from .nn.netted import Netted, cast_net, note_owned, status_of_net, take_net, why_not_taken
from .report import Left, Replaced, Report, lowered
from .rules import Configs, Gets, Stays, checked, decide


def razor_(
    model: nn.Module, config: Configs | None = None, filter_fn: Callable[[str, nn.Module], bool] | None = None
) -> Report:
    """Convert ``model`` in place so that backward works from pruned activations; returns a report.

    Parameters, buffers, state_dict keys, hooks and modes are untouched; the forward pass computes what it computed
    before: on the CPU bit for bit, on CUDA to rounding in three cases (docs/kernels.md). The classes of layers, and of
    containers that hold chains of them, become subclasses of what they were.

    On a model that is razored already, what this call chooses is converted anew. A drop-in that ``filter_fn`` leaves
    out, or that no pattern matches, stays as the earlier call left it. What this call makes dense, by None or because
    the new configuration refuses it, is turned back. The report counts all three.

    Args:
        model: any module.
        config: one RazorConfig for all layers (default: ``RazorConfig()``, the compact preset at sparsity 0.9), or a
            dict from patterns to RazorConfig, or to None for layers that are to be dense. Patterns are those of
            ``fnmatch.fnmatchcase`` and meet the qualified names of ``model.named_modules()``; ``*`` also matches dots.
            The first pattern that matches a layer decides, in the order of the dict, so put ``"*"`` last. A layer that
            no pattern matches is left as it is, and the report says so.
        filter_fn: called with (qualified name, module); only modules for which it returns True are converted. With
            patterns, it is asked about the layers that these give a RazorConfig.

    Raises:
        TypeError: ``model``, ``config``, or a key or value of a dict is of another type.
        ValueError: nothing in the model could be converted, or a pattern decides for no layer; the message names it.
            The model is as it was.
        RuntimeError: the model is razored already and cannot be turned back; see ``unrazor_``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"razor_ takes a torch.nn.Module, not {type(model).__name__}")
    config = checked(config)
    earlier = {name: Earlier.of(m) for name, m in model.named_modules() if isinstance(m, (DropIn, Linked, Netted))}
    unrazor_(model)  # the rules look at a plain model
    try:
        decisions = list(decide(model, config, filter_fn))
        report = _reported(config, decisions, {name: e for name, e in earlier.items() if issubclass(e.cls, DropIn)})
        if not report.replaced and not report.earlier_turned_back:
            raise ValueError(
                f"nothing in {type(model).__name__} was converted: no module is one of {', '.join(known_layers())} and "
                "is chosen by config and filter_fn"
            )
    except BaseException:
        for state in earlier.values():
            state.restore()
        raise
    under = list(nets(model, config, decisions, report.earlier_kept))  # before classes change, by which it goes
    for name in report.earlier_kept:
        earlier[name].restore()
    devices = devices_of(model)
    for gets in decisions:
        if isinstance(gets, Gets):
            attach(gets.module, gets.drop_in, gets.rules, devices)
    report.fused = link_chains(model)
    for module, rules in under:
        cast_net(module, rules, devices)
    note_owned(model)
    report.lowered = lowered(model)
    return report


def _reported(config: Configs, decisions: list[Gets | Stays], earlier: dict[str, Earlier]) -> Report:
    """The report of what is going to be done; ``earlier``: the drop-ins that were there, by name."""
    report, fates = Report(config), dict.fromkeys(earlier, "turned back")
    for it in decisions:
        kind = type(it.module).__name__
        if isinstance(it, Gets):
            fates[it.name] = "converted anew"
            report.replaced.append(Replaced(it.name, kind, it.drop_in.__name__, it.keeps, it.config, it.pattern))
            continue
        reason = it.reason
        if it.passed_over and it.name in earlier:
            fates[it.name] = "kept"
            reason += ", so what an earlier razor_ made of it stays"
        report.left.append(Left(it.name, kind, reason))
    report.earlier_kept = [name for name in earlier if fates[name] == "kept"]
    report.earlier_renewed = [name for name in earlier if fates[name] == "converted anew"]
    report.earlier_turned_back = [name for name in earlier if fates[name] == "turned back"]
    return report


def unrazor_(model: nn.Module) -> int:
    """The exact way back, in place; returns how many modules were turned back.

    Parametrizations (``torch.nn.utils.parametrize``) that were registered after ``razor_`` stay.

    Raises:
        RuntimeError: a module was changed after ``razor_`` in a way that the way back would break; the message names it
            and what to do, and nothing has been touched.
    """
    drop_ins = [module for module in model.modules() if isinstance(module, DropIn)]
    under = [module for module in model.modules() if isinstance(module, Netted)]
    containers = [module for module in model.modules() if isinstance(module, Linked)]
    for name, module in model.named_modules():
        base: type[nn.Module] | None = None
        if isinstance(module, DropIn):
            base = class_given_to(module)
        elif isinstance(module, Linked):
            base = linked(module._backrazor_linked)
        reason = None if base is None else why_not_detached(module, base)
        if isinstance(module, Netted):
            reason = reason or why_not_taken(module)
        if reason is not None:
            raise RuntimeError(f"{name or type(module).__name__} cannot be turned back: {reason}")
    for module in under:
        take_net(module)
    for module in drop_ins:
        detach(module)
    for module in containers:
        unlink(module)
    return len(drop_ins)


def status_of(model: nn.Module) -> Tensor | None:
    """What ``check_finite`` would stop on, without reading the device: () int32, 0 where all is well, on the device of
    the first flag. None where nothing in the model packs. For steps that must not wait, such as a CUDA graph's."""
    flags = _flags(model)
    return None if not flags else _together(flags).bitwise_and(NON_FINITE | OVERFLOW).amax()


def _flags(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The status bits of everything in a model that packs, drop-ins and modules under the net, by name."""
    return [
        (name, flag)
        for name, module in model.named_modules()
        for flag in (*status_flags(module), *status_of_net(module))
    ]


def _together(flags: list[tuple[str, Tensor]]) -> Tensor:
    """All of them on the device of the first."""
    return torch.cat([flag.to(flags[0][1].device) for _, flag in flags])


def check_finite(model: nn.Module) -> None:
    """Stop on bad numbers: call it after ``backward`` and before the optimizer steps.

    Reads the device once for the whole model.

    Raises:
        FloatingPointError: a packed activation held NaN or Inf, or a value too large for its stored type. Names the
            layers; the flags are cleared, so that the caller may skip the step and go on.
    """
    flags = _flags(model)
    if not flags:
        return
    known = NON_FINITE | OVERFLOW
    status = [bits & known for bits in _together(flags).tolist()]
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
    overflowed = any(bits & OVERFLOW for bits in status)
    hint = "; use values='bfloat16' or 'float32' for a wider range" if overflowed else ""
    raise FloatingPointError("; ".join(problems) + hint)
