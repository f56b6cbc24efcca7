"""Drop-ins for normalisation."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional
from .base import DropIn, LayerRules, is_frozen
from .fusion import hands_through

_WORDS = {
    "dense": "input, dense (norm=dense)",
    "pruned": "input, pruned",
    "bfloat16": "input in bfloat16",
    "int8": "normalised input in int8",
    "int4": "normalised input in int4",
}


def norm_words(rules: LayerRules) -> str:
    """What a normalisation layer keeps under these rules, in words."""
    return _WORDS[rules.norm.kind]


def batch_norm(module: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    """``module``'s own forward on x, with the bookkeeping of ``torch.nn.BatchNorm2d``, through the pruned operator."""
    momentum = 0.0 if module.momentum is None else module.momentum
    if module.training and module.track_running_stats and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:
            momentum = 1.0 / float(module.num_batches_tracked)
    no_statistics = module.running_mean is None and module.running_var is None
    use_batch = module.training or no_statistics
    tracked = not module.training or module.track_running_stats
    mean, variance = (module.running_mean, module.running_var) if tracked else (None, None)
    return functional.batch_norm(
        x,
        mean,
        variance,
        module.weight,
        module.bias,
        use_batch,
        momentum,
        module.eps,
        module.razor.norm,
        module.flag_for(x),
    )


class _RazorBatchNorm(DropIn):
    link = "norm"

    def inner_activation(self) -> None:
        """These norms carry no activation."""

    @classmethod
    def keeps(cls, module: nn.Module, rules: LayerRules) -> str:
        return f"on running statistics nothing, else {norm_words(rules)}"

    @classmethod
    def rules_used(cls, module: nn.Module) -> tuple[str, ...]:
        return () if is_frozen(module) else ("norm",)

    def forward(self, input: Tensor) -> Tensor:
        if hands_through(self, input):
            return input
        self._check_input_dim(input)
        return batch_norm(self, input)


class RazorBatchNorm1d(_RazorBatchNorm, nn.BatchNorm1d):
    """BatchNorm1d: nothing kept on running statistics, the input by the norm rule otherwise."""

    link = None  # what a Conv2d gives it, it refuses


class RazorBatchNorm2d(_RazorBatchNorm, nn.BatchNorm2d):
    """BatchNorm2d: nothing kept on running statistics, the input by the norm rule otherwise."""


class RazorLayerNorm(DropIn, nn.LayerNorm):
    """LayerNorm that keeps its input by the norm rule."""

    @classmethod
    def refusal(cls, module: nn.Module, rules: LayerRules) -> str | None:
        return "norm=dense" if rules.norm.kind == "dense" else None

    @classmethod
    def keeps(cls, module: nn.Module, rules: LayerRules) -> str:
        return norm_words(rules)

    @classmethod
    def rules_used(cls, module: nn.Module) -> tuple[str, ...]:
        return ("norm",)

    def forward(self, input: Tensor) -> Tensor:
        return functional.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, self.razor.norm, self.flag_for(input)
        )


class RazorRMSNorm(DropIn, nn.RMSNorm):
    """RMSNorm that keeps its input by the norm rule."""

    refusal = RazorLayerNorm.refusal
    keeps = RazorLayerNorm.keeps
    rules_used = RazorLayerNorm.rules_used

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps, self.razor.norm, self.flag_for(x))


class RazorGroupNorm(DropIn, nn.GroupNorm):
    """GroupNorm that keeps its input by the norm rule."""

    refusal = RazorLayerNorm.refusal
    keeps = RazorLayerNorm.keeps
    rules_used = RazorLayerNorm.rules_used

    def forward(self, input: Tensor) -> Tensor:
        return functional.group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps, self.razor.norm, self.flag_for(input)
        )
