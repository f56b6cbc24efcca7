"""What each layer of a model gets, and why: pure functions of the model and the configuration.

Nothing here changes a module. ``convert.py`` does what ``decide`` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .codecs import NormCodec, Pruned, whole_values
from .config import RazorConfig
from .functional import AttentionCodec
from .nn import DROP_INS, STAYS, DropIn, LayerRules, drop_in_for, qualified_name
from .nn.attention import RazorMultiheadAttention, SdpaDropIn
from .nn.base import MadeDropIn, has_its_own_forward, is_patched

Configs: TypeAlias = RazorConfig | Mapping[str, RazorConfig | None]

_ATTENTION = (SdpaDropIn, RazorMultiheadAttention)
_EXAMPLE = "{'head': None, '*': RazorConfig(0.9)}"


@dataclass(frozen=True)
class Gets:
    """A module that becomes the drop-in ``drop_in`` under ``rules``. ``config``: what they come from, and the pattern
    that chose it, if there was one."""

    name: str
    module: nn.Module
    drop_in: type[DropIn]
    rules: LayerRules
    keeps: str
    config: RazorConfig
    pattern: str | None


@dataclass(frozen=True)
class Stays:
    """A module that stays as it is, and why. ``passed_over``: nobody asked for it to be dense, so that what an earlier
    ``razor_`` made of it holds. ``by_choice``: the caller left it out, so that nothing in it is to change."""

    name: str
    module: nn.Module
    reason: str
    passed_over: bool = False
    by_choice: bool = False


@dataclass(frozen=True)
class Surroundings:
    """What the rules of one layer depend on beside the layer itself."""

    head: str | None
    ends: frozenset[str]
    is_cnn: bool
    attends: bool

    @classmethod
    def of(cls, model: nn.Module) -> Surroundings:
        """Looks at the whole model."""
        ends = transformer_ends(model)
        has_convolution = any(isinstance(module, _ConvNd) for module in model.modules())
        attends = bool(ends) or any(_is_attention(type(module)) for module in model.modules())
        return cls(head_name(model), ends, has_convolution and not ends, attends)


def checked(config: Configs | None) -> Configs:
    """``config``, or the default where it is None.

    Raises:
        TypeError: it is neither a RazorConfig nor a dict from patterns to RazorConfig or None.
        ValueError: the dict is empty.
    """
    if config is None:
        return RazorConfig()
    if isinstance(config, RazorConfig):
        return config
    if not isinstance(config, Mapping):
        raise TypeError(
            f"config takes a RazorConfig, or a dict from patterns to RazorConfig or None, not {type(config).__name__}: "
            "use RazorConfig(sparsity=...)"
        )
    if not config:
        raise ValueError(f"config is an empty dict: use patterns of layer names, such as {_EXAMPLE}")
    for pattern, value in config.items():
        if not isinstance(pattern, str):
            raise TypeError(f"config takes patterns of layer names as keys, not {pattern!r:.100}: use {_EXAMPLE}")
        if value is not None and not isinstance(value, RazorConfig):
            raise TypeError(
                f"the pattern {pattern!r} takes a RazorConfig or None, not {type(value).__name__}: use {_EXAMPLE}"
            )
    return config


def decide(
    model: nn.Module, config: Configs, filter_fn: Callable[[str, nn.Module], bool] | None
) -> Iterator[Gets | Stays]:
    """What each module of a plain ``model`` gets, in module order. A module without a drop-in of which there is nothing
    to say is left out.

    Raises:
        ValueError: a pattern decides for no layer.
    """
    patterns = _deciding(model, config) if isinstance(config, Mapping) else {}
    surroundings = Surroundings.of(model)
    for name, module in model.named_modules():
        cls = drop_in_for(module)
        if cls is None:
            why = _why_it_stays(module, is_root=module is model)
            if why is not None:
                yield Stays(name, module, why)
            continue
        pattern = patterns.get(id(module))
        chosen = config if isinstance(config, RazorConfig) else None if pattern is None else config[pattern]
        if is_patched(module):
            yield Stays(name, module, "its forward is replaced on the instance, so that of the drop-in would not run")
        elif _is_shipped(type(module), cls) and not has_its_own_forward(type(module)):
            yield Stays(name, module, "the forward of its class is replaced by one that this library does not know")
        elif isinstance(config, Mapping) and pattern is None:
            yield Stays(name, module, "no pattern matches it", passed_over=True, by_choice=True)
        elif chosen is None:
            yield Stays(name, module, f"left out by the pattern {pattern!r}", by_choice=True)
        elif filter_fn is not None and not filter_fn(name, module):
            yield Stays(name, module, "left out by filter_fn", passed_over=True, by_choice=True)
        else:
            rules = layer_rules(chosen, name, module, surroundings)
            reason = _refusal(chosen, name, module, cls, rules, surroundings)
            if reason is None:
                yield Gets(name, module, cls, rules, cls.keeps(module, rules), chosen, pattern)
            else:
                yield Stays(name, module, reason)


def _is_shipped(cls: type[nn.Module], drop_in: type[DropIn]) -> bool:
    """Whether this library, and nobody else, says that ``drop_in`` takes the place of ``cls``."""
    return qualified_name(cls) in DROP_INS or issubclass(drop_in, MadeDropIn)


def _deciding(model: nn.Module, configs: Mapping[str, RazorConfig | None]) -> dict[int, str]:
    """The pattern that decides for each module that has a drop-in, by the module's id: the first that matches one of
    its names.

    The first and not the most specific: of two patterns with wildcards it is often not clear which one says more, and
    a dict is read from top to bottom.

    Raises:
        ValueError: a pattern decides for no module.
    """
    named = [(name, module) for name, module in model.named_modules(remove_duplicate=False)]
    having = [(name, id(module)) for name, module in named if drop_in_for(module) is not None]
    deciding: dict[int, str] = {}
    for pattern in configs:
        matched = [key for name, key in having if fnmatchcase(name, pattern)]
        if all(key in deciding for key in matched):
            raise ValueError(_why_idle(pattern, named, [deciding[key] for key in matched]))
        for key in matched:
            deciding.setdefault(key, pattern)
    return deciding


def _why_idle(pattern: str, named: list[tuple[str, nn.Module]], earlier: list[str]) -> str:
    """Why a pattern decides for no layer; ``earlier``: the patterns that decide for what it matches."""
    if earlier:
        others = " and ".join(map(repr, dict.fromkeys(earlier)))
        return f"the pattern {pattern!r} decides for no layer: the first match decides, so put it before {others}"
    met = [(name, type(module).__name__) for name, module in named if fnmatchcase(name, pattern)]
    if not met:
        names = [name for name, module in named if name and drop_in_for(module) is not None]
        example = f", such as {names[-1]!r}" if names else ""
        return f"the pattern {pattern!r} matches no module: use names of model.named_modules(){example}"
    name, kind = met[0]
    inside = any(fnmatchcase(other, f"{pattern}.*") and drop_in_for(module) is not None for other, module in named)
    hint = f": use {pattern + '.*'!r} for the layers inside" if inside else ""
    return f"the pattern {pattern!r} matches no layer that has a drop-in, only {name or 'the model'} ({kind}){hint}"


def _refusal(
    config: RazorConfig,
    name: str,
    module: nn.Module,
    cls: type[DropIn],
    rules: LayerRules,
    surroundings: Surroundings,
) -> str | None:
    """Why a layer stays dense under its rules, or None."""
    if stays_dense(config, name, surroundings):
        return "the paper leaves both ends of a transformer dense"
    return cls.refusal(module, rules)


def stays_dense(config: RazorConfig, name: str, surroundings: Surroundings) -> bool:
    """Whether the configuration leaves a layer alone for where it stands, whatever computes it."""
    return name in surroundings.ends and config.values == "paper"


def layer_rules(config: RazorConfig, name: str, module: nn.Module, surroundings: Surroundings) -> LayerRules:
    """The configuration resolved for one layer."""
    is_head = name == surroundings.head
    # Most of the gradient, in few bytes (docs/gradients.md): a CNN's classifier reads one vector per image.
    whole = name in surroundings.ends or (is_head and surroundings.is_cnn and config.fill != "zero")
    sparsity = 0.0 if whole else config.sparsity
    if is_head and config.head_sparsity is not None:
        sparsity = config.head_sparsity
    values = config.values
    if values == "paper":
        values = "float16"
        if isinstance(module, nn.Conv2d):
            values = "float32"
        elif is_head and surroundings.is_cnn:
            values = "int8"
    if whole:
        values = whole_values(values)
    pruned = Pruned(sparsity, values, config.index, config.fill)
    norm_values = "float32" if config.values == "paper" else values
    of_norm = (config.batch_norm if isinstance(module, _BatchNorm) else None) or config.norm
    norm = NormCodec(of_norm, replace(pruned, values=norm_values))
    # Elsewhere no residual stream passes by the activations, and the error of their derivatives multiplies with depth.
    auto = config.activation == "auto" and not surroundings.attends
    activation = "int4" if auto else config.activation
    return LayerRules(pruned, norm, activation, AttentionCodec(config.attention, pruned), config.gate)


def head_name(model: nn.Module) -> str | None:
    """Name of the classifier: the last Linear in module order."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return names[-1] if names else None


def transformer_ends(model: nn.Module) -> frozenset[str]:
    """Names of the patch convolution, the final norm and the classifier of a network with attention; else empty.

    The first sees images, the last one token or their mean: together below 2% of the bytes, and most of the gradient,
    so neither is pruned (docs/gradients.md).
    """
    names, modules = zip(*model.named_modules(), strict=True)
    drop_ins = dict(zip(names, map(drop_in_for, modules), strict=True))
    attention = [
        i
        for i, (cls, module) in enumerate(zip(drop_ins.values(), modules, strict=True))
        if (issubclass(cls, _ATTENTION) if cls else _attends_by_functions(module))
    ]
    if not attention:
        return frozenset()
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
    return frozenset(ends)


def _why_it_stays(module: nn.Module, is_root: bool) -> str | None:
    """What to say of a module without a drop-in; None where it keeps nothing, or its parts say it all."""
    cls = type(module)
    if qualified_name(cls) in STAYS:
        return STAYS[qualified_name(cls)]
    if not any(True for _ in module.children()):
        return "no drop-in for this class"
    if _is_attention(cls) and not any(_is_attention(type(part)) for part in module.modules() if part is not module):
        return "attention of a class without a drop-in: only functions that it calls are met"
    own = [name for name, parameter in module.named_parameters(recurse=False) if parameter.requires_grad]
    if own and not is_root:
        return f"uses its own {', '.join(own)} itself: only functions that it calls are met"
    return None


def _attends_by_functions(module: nn.Module) -> bool:
    """Whether a module is an attention of tokens without a drop-in: it has projections of tokens of its own."""
    return _is_attention(type(module)) and any(isinstance(part, nn.Linear) for part in module.modules())


def _is_attention(cls: type[nn.Module]) -> bool:
    """By name: libraries have dozens of attention classes."""
    return "Attention" in cls.__name__ or "Attn" in cls.__name__
