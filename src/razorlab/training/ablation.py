"""The method's ablations, for the laboratory alone: pruning in the forward pass too, and selection at random.

The library's forward stays dense and its selection stays by magnitude. ``ablate`` puts hooks and a codec of its own on
the layers of a network that ``razor_`` has converted; nothing in ``backrazor`` knows of them.

Shape legend: B samples, n elements per sample, K of them kept.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backrazor.codecs import Pruned, PrunedForm, load, pack, packed_of, save
from backrazor.functional.transforms import RazorFunction, differentiable_once
from backrazor.nn import DropIn
from razorlab import schema
from razorlab.errors import UserError


@dataclass(frozen=True)
class AtRandom(Pruned):
    """As many elements of each sample as ``Pruned`` keeps, drawn uniformly from torch's generator at every packing."""

    def form(self, x: Tensor) -> PrunedForm:
        """How x (B, ...) is going to be stored."""
        return AtRandomForm(**dataclasses.asdict(Pruned.form(self, x)))


@dataclass(frozen=True)
class AtRandomForm(PrunedForm):
    """Stores the drawn elements: those left out are zero when the largest magnitudes are chosen."""

    def pack(self, x: Tensor, flag: Tensor) -> tuple[Tensor, ...]:
        """What is stored of x (B, ...). NaN and infinity are never hidden: times zero they are NaN."""
        if self.keep < self.sample_numel:
            chosen = torch.rand(x.shape[0], self.sample_numel, device=x.device).topk(self.keep).indices
            mask = x.new_zeros(x.shape[0], self.sample_numel).scatter_(1, chosen, 1)
            x = (x.reshape(mask.shape) * mask).view(x.shape)
        return PrunedForm.pack(self, x, flag)


class _Prune(RazorFunction):
    """x -> x_hat, zero for what the codec drops. The gradient is the true one: zero at the same places."""

    @staticmethod
    def forward(x: Tensor, form: PrunedForm, *stored: Tensor) -> Tensor:
        return form.read(stored, 0, len(x), x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, form, *stored = inputs
        save(ctx, packed_of(form, stored))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = load(ctx)
        return grad * (packed.unpack() != 0), *(None for _ in range(1 + len(packed.tensors)))


@dataclass(frozen=True)
class PruneInput:
    """A forward pre-hook that hands a layer its pruned input, kept values in their own precision; the input as it is
    where ``unrazor_`` has made the layer plain again."""

    codec: Pruned

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if not isinstance(module, DropIn):
            return arguments
        x, *others = arguments
        packed = pack(x, self.codec, module.flag_for(x))
        return _Prune.run(x, packed.form, *packed.tensors), *others


def ablate(model: nn.Module, razor: schema.Razor) -> str:
    """Do what ``razor.forward`` and ``razor.selection`` ask of a razored ``model``, in place.

    Selection at random reaches every top-K codec: layer inputs, norms and attention under the rule "pruned". Pruning
    forward reaches the layers whose input is pruned for the gradient of a weight that trains, in evaluation as in
    training; backward then reads the very elements that forward has read.

    Args:
        razor: that section of the configuration; of a record that is older than the keys, without them.

    Returns:
        What was done, as lines for the report; empty where nothing was asked for.

    Raises:
        UserError: the configuration guesses at dropped elements: an ablation is of the rule that reads zero.
    """
    forward, selection = razor.get("forward", "dense"), razor.get("selection", "magnitude")
    if forward == "dense" and selection == "magnitude":
        return ""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, DropIn)}
    asked = "razor.forward=pruned" if forward == "pruned" else "razor.selection=random"
    if any(module.razor.pruned.fill != "zero" for module in layers.values()):
        raise UserError(f"{asked} is an ablation of the rule that reads zero for what is dropped: set razor.fill=zero")
    lines = []
    if forward == "pruned":
        pruned = [name for name, module in layers.items() if _prunes(module)]
        for name in pruned:
            codec = dataclasses.replace(layers[name].razor.pruned, values="float32")
            layers[name].register_forward_pre_hook(PruneInput(_at_random(codec) if selection == "random" else codec))
        lines.append(f"razor.forward=pruned: {len(pruned)} layers compute with their pruned input")
    if selection == "random":
        for module in layers.values():
            if forward == "dense" or not _prunes(module):
                module.razor = _rules_at_random(module.razor)
        lines.append("razor.selection=random: what is kept is drawn at every step, not the largest magnitudes")
    return "\n" + "\n".join(lines)


def _prunes(module: DropIn) -> bool:
    weight = getattr(module, "weight", None)
    trains = weight is not None and weight.requires_grad
    return module.prunes and trains and module.razor.pruned.sparsity > 0


def _at_random(codec: Pruned) -> AtRandom:
    return AtRandom(**dataclasses.asdict(codec))


def _rules_at_random(rules: Any) -> Any:
    """A layer's rules (``backrazor.nn.base.LayerRules``) with every top-K codec drawing."""
    norm = rules.norm if rules.norm.pruned is None else dataclasses.replace(rules.norm, pruned=_at_random(rules.pruned))
    attention = rules.attention._replace(pruned=_at_random(rules.attention.pruned))
    return dataclasses.replace(rules, pruned=_at_random(rules.pruned), norm=norm, attention=attention)
