"""What trains, and what batch norm does: the ``method`` section of a configuration.

The head trains in every method. ``bn_affine=frozen`` takes batch norm's scale and shift out of whatever the method
selects; ``bn_stats=frozen`` normalises with the pretrained mean and variance, in training as in evaluation.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from razorlab import schema
from razorlab.models.tinytl import LiteResidual

NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d)


def _full(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def _last(model: nn.Module) -> set[str]:
    return set()


def _norm_last(model: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, NORMS)
        for name, _ in module.named_parameters(recurse=False)
    }


def _bias(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"}


def _tinytl_l(model: nn.Module) -> set[str]:
    return {
        f"{prefix}.lite.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, LiteResidual)
        for name, _ in module.lite.named_parameters()
    }


def _tinytl_lb(model: nn.Module) -> set[str]:
    """The shift of a branch's last norm stays, as in TinyTL's code: that of the main path beside it is the same."""
    branches = [(prefix, module.lite) for prefix, module in model.named_modules() if isinstance(module, LiteResidual)]
    return (_tinytl_l(model) | _bias(model)) - {f"{prefix}.lite.{len(lite) - 1}.bias" for prefix, lite in branches}


def _lora(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if ".lora_" in name}


METHODS: dict[str, Callable[[nn.Module], set[str]]] = {
    "full": _full,
    "last": _last,
    "norm_last": _norm_last,
    "bias": _bias,
    "lora": _lora,
    "tinytl_l": _tinytl_l,
    "tinytl_lb": _tinytl_lb,
}


def apply_method(model: nn.Module, head: str, method: schema.Method) -> tuple[str, ...]:
    """Set ``requires_grad`` on every parameter of the plain network ``model``.

    Args:
        head: name of the classifier module, whose parameters always train.

    Returns:
        Names of the batch norm modules that stay in evaluation mode during training, for ``set_train_mode``.
    """
    batch_norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    trained = METHODS[method["name"]](model)
    if method["bn_affine"] == "frozen":
        trained -= {f"{name}.{leaf}" for name in batch_norms for leaf in ("weight", "bias")}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained or name.startswith(f"{head}."))
    return tuple(batch_norms) if method["bn_stats"] == "frozen" else ()


def set_train_mode(model: nn.Module, frozen_batch_norms: tuple[str, ...]) -> None:
    """Put ``model`` in training mode, the named batch norms in evaluation mode (by name: they may be drop-ins)."""
    model.train()
    for name in frozen_batch_norms:
        model.get_submodule(name).eval()
