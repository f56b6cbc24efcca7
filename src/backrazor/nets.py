"""Which modules of a model stand under the net, and by which rules: functions of model and configuration, changing
nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from .config import RazorConfig
from .nn import DropIn
from .nn.netted import NetRules
from .rules import Configs, Gets, Stays, Surroundings, layer_rules, stays_dense

_OPEN = NetRules(packs=False, rules=None)  # everything as it is


def nets(
    model: nn.Module, config: Configs, decisions: Collection[Gets | Stays], kept: Collection[str]
) -> Iterator[tuple[nn.Module, NetRules]]:
    """The modules of a model to be put under the net, with their rules: the model, what holds other modules, and what
    has other rules than the module that holds it. A layer that was left out, and a module whose layers all were, stays
    as it is inside. With patterns, a module follows the first that matches its name, and else the module that holds it.

    Args:
        decisions: what ``rules.decide`` says of every layer.
        kept: names of the layers that an earlier ``razor_`` has converted.
    """
    fates = {id(it.module): it for it in decisions}
    left_out = {key for key, it in fates.items() if isinstance(it, Stays) and it.by_choice and it.name not in kept}
    chosen = {id(it.module) for it in decisions if isinstance(it, Gets) or it.name in kept}
    surroundings = Surroundings.of(model)
    seen: set[int] = set()

    def visit(name: str, module: nn.Module, above: RazorConfig | None, rules_above: NetRules | None) -> Iterator:
        if id(module) in seen:
            return
        seen.add(id(module))
        own = _config_of(name, config, above)
        parts = [id(part) for part in module.modules()]
        if any(part in left_out for part in parts) and not any(part in chosen for part in parts):
            own = None
        rules = _OPEN if own is None else _rules(own, name, module, surroundings)
        below = rules
        if id(module) in chosen:
            below = rules_above if rules_above is not None else rules
        elif _takes_a_net(module) and (
            rules_above is None or rules != rules_above or (any(True for _ in module.children()) and rules != _OPEN)
        ):
            yield module, rules
        elif rules_above is not None:
            below = rules_above
        for child_name, child in module.named_children():
            yield from visit(f"{name}.{child_name}" if name else child_name, child, own, below)

    yield from visit("", model, None, None)


def _config_of(name: str, config: Configs, above: RazorConfig | None) -> RazorConfig | None:
    if isinstance(config, RazorConfig):
        return config
    return next((chosen for pattern, chosen in config.items() if fnmatchcase(name, pattern)), above)


def _rules(config: RazorConfig, name: str, module: nn.Module, surroundings: Surroundings) -> NetRules:
    if stays_dense(config, name, surroundings):
        return NetRules(config.rest == "int8", None)
    return NetRules(config.rest == "int8", layer_rules(config, name, module, surroundings))


def _takes_a_net(module: nn.Module) -> bool:
    """Whether the module is called, and its class can be changed."""
    if isinstance(module, (DropIn, ParametrizationList, torch.jit.ScriptModule, torch._dynamo.OptimizedModule)):
        return False
    return type(module).forward is not nn.Module.forward
