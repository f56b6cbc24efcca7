"""The memory formula that the paper's released code prints: a formula over layer shapes, never a measurement.

It walks the layers of one sample in forward order and adds up what it believes backward needs. The figure is

    batch * max over layers (kept so far + this layer's temporaries + the residual input held meanwhile) + parameters

with 4 bytes per trainable and 1 byte per frozen parameter. What it leaves out (dense tensors that autograd keeps for
ReLU6, frozen batch norm, dropout, pooling) is why it stands in a column of its own, beside predicted, saved and peak.

Source: `CNN/utils/memory_cost_profiler.py` and `ViT/utils/memory_cost_profiler.py` of VITA-Group/BackRazor_Neurips22,
the first of them in turn from TinyTL (Cai et al., NeurIPS 2020).

Legend: N tokens, D width, H heads, n elements of one sample, s sparsity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from razorlab.official.shapes import forward_shapes
from razorlab.official.structure import (
    NORMS,
    adds_its_input,
    check_defined,
    is_attention,
    is_mlp,
    is_smooth_activation,
    is_transformer_block,
)

FLOAT_BYTES = 4.0
HALF_BYTES = 2.0
BITMAP_BYTES = 1 / 8
FROZEN_PARAMETER_BYTES = 1

_ONE_BIT_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)


@dataclass(frozen=True)
class OfficialRow:
    """What the formula keeps for one operand of one layer, for the whole batch. `role` names the operand."""

    module: str
    role: str
    bytes: float


@dataclass(frozen=True)
class OfficialMemory:
    """The released formula's answer, in bytes for the whole batch.

    `total_bytes` = `peak_activation_bytes` + `parameter_bytes`. `rows` lists everything kept, in forward order;
    the peak is what had been kept when the layer `peak_module` ran, plus its temporaries and the residual held there.
    """

    total_bytes: float
    peak_activation_bytes: float
    parameter_bytes: float
    peak_module: str
    rows: tuple[OfficialRow, ...]


def official_formula(
    model: nn.Module,
    input_size: tuple[int, ...],
    batch_size: int,
    sparsity: float | None = None,
    head_sparsity: float | None = None,
) -> OfficialMemory:
    """The released code's memory figure for a plain (not razored) network.

    Args:
        model: a convolutional classifier, or a vision transformer whose blocks hold a fused-qkv attention and an MLP as
            timm's do. What trains is read from `requires_grad`. Only shapes are computed; no activation is allocated.
        input_size: one sample's shape without the batch axis, such as (3, 224, 224).
        batch_size: the batch that the activations are multiplied by.
        sparsity: share pruned, in [0, 1); None gives the dense baseline.
        head_sparsity: share pruned from the input of a convolutional network's Linear layers; None means `sparsity`.
            The formula never prunes a transformer's head.

    Raises:
        ValueError: a sparsity outside [0, 1), a batch below 1, a razored model, or layers the formula does not define.
    """
    for key, value in (("sparsity", sparsity), ("head_sparsity", head_sparsity)):
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{key}={value!r} is outside [0, 1)")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be at least 1")
    if sparsity is None and head_sparsity is not None:
        raise ValueError(f"head_sparsity={head_sparsity!r} needs a sparsity: the dense baseline prunes nothing")
    check_defined(model)
    walk = _Walk(_names(model))
    blocks = [module for module in model.modules() if is_transformer_block(module)]
    if blocks:
        _hook_transformer(walk, model, blocks, sparsity)
    else:
        _hook_cnn(walk, model, sparsity, sparsity if head_sparsity is None else head_sparsity)
    try:
        forward_shapes(model, input_size)
    finally:
        walk.remove_hooks()
    parameter_bytes = sum(
        p.numel() * (FLOAT_BYTES if p.requires_grad else FROZEN_PARAMETER_BYTES) for p in model.parameters()
    )
    activation_bytes = walk.peak * batch_size
    rows = tuple(OfficialRow(module, role, kept * batch_size) for module, role, kept in walk.rows)
    return OfficialMemory(activation_bytes + parameter_bytes, activation_bytes, parameter_bytes, walk.peak_module, rows)


class _Walk:
    """Running totals of one sample's forward, fed by hooks. All in bytes."""

    def __init__(self, names: dict[nn.Module, str]):
        self.names = names
        self.rows: list[tuple[str, str, float]] = []
        self.kept = self.residual = self.peak = 0.0
        self.peak_module = ""
        self._handles: list = []

    def before(self, module: nn.Module, action: Callable[[Tensor], None]) -> None:
        """Run `action(input)` before `module`."""
        self._handles.append(module.register_forward_pre_hook(lambda _, args: action(_one_sample(args[0]))))

    def after(self, module: nn.Module, action: Callable[[Tensor, Tensor], None]) -> None:
        """Run `action(input, output)` after `module`."""
        self._handles.append(module.register_forward_hook(lambda _, args, out: action(_one_sample(args[0]), out)))

    def hold_residual(self, module: nn.Module) -> None:
        """Count `module`'s input as held while anything inside it runs."""

        def release(*_: Tensor) -> None:
            self.residual = 0.0

        def hold(x: Tensor) -> None:
            self.residual = x.numel() * FLOAT_BYTES

        self.before(module, hold)
        self.after(module, release)

    def touch(self, module: nn.Module, temporary_bytes: float) -> None:
        total = self.kept + temporary_bytes + self.residual
        if total > self.peak:
            self.peak, self.peak_module = total, self.names[module]

    def keep(self, module: nn.Module, role: str, kept_bytes: float) -> None:
        if kept_bytes:
            self.rows.append((self.names[module], role, kept_bytes))
            self.kept += kept_bytes

    def remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()


def _hook_cnn(walk: _Walk, model: nn.Module, sparsity: float | None, head_sparsity: float | None) -> None:
    """Convolutions and Linears keep a pruned input if their weight trains, norms a dense one, activations one bit."""
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise ValueError(
            f"the official formula is defined for convolutional networks and vision transformers, not {_kind(model)}"
        )
    activations_count = _trains_below_the_head(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            _hook_weighted(walk, module, _fraction_bytes(sparsity, FLOAT_BYTES), module.groups)
        elif isinstance(module, nn.Linear):
            _hook_weighted(walk, module, _fraction_bytes(head_sparsity, FLOAT_BYTES))
        elif isinstance(module, NORMS):
            _hook_norm(walk, module, lambda n: n * FLOAT_BYTES)
        elif isinstance(module, _ONE_BIT_ACTIVATIONS):
            _hook_activation(walk, module, BITMAP_BYTES if activations_count else 0.0)
        elif is_smooth_activation(module):
            _hook_activation(walk, module, FLOAT_BYTES if activations_count else 0.0)
        if adds_its_input(module):
            walk.hold_residual(module)


def _hook_transformer(walk: _Walk, model: nn.Module, blocks: list[nn.Module], sparsity: float | None) -> None:
    """Blocks prune their Linears (float16 values), norms (float32) and attention operands; all else stays dense."""
    counted: set[nn.Module] = set()
    for block in blocks:
        for module in block.children():
            if is_attention(module):
                _hook_attention(walk, module, sparsity)
                counted.update((module.qkv, module.proj))
            elif is_mlp(module):
                _hook_mlp(walk, module, sparsity)
                counted.update((module.fc1, module.fc2))
            elif isinstance(module, nn.LayerNorm):
                _hook_norm(walk, module, _counted_bytes(sparsity, FLOAT_BYTES))
                counted.add(module)
    for module in model.modules():
        if module in counted:
            continue
        if isinstance(module, nn.Conv2d):
            _hook_weighted(walk, module, _fraction_bytes(None, FLOAT_BYTES), module.groups)
        elif isinstance(module, nn.Linear):
            _hook_weighted(walk, module, _fraction_bytes(None, FLOAT_BYTES))
        elif isinstance(module, nn.LayerNorm):
            _hook_norm(walk, module, lambda n: n * FLOAT_BYTES)


def _hook_attention(walk: _Walk, attention: nn.Module, sparsity: float | None) -> None:
    """q, k, v and the scores on entry, then q, k and v as three Linears that each keep the input they share."""
    operand_bytes = _fraction_bytes(sparsity, HALF_BYTES)
    width = attention.qkv.out_features // 3

    def enter(x: Tensor) -> None:
        if x.dim() != 3:
            raise ValueError(
                f"the official formula needs attention on (batch, tokens, width), this one got {tuple(x.shape)}"
            )
        tokens = x.shape[1]
        walk.keep(attention, "scores", operand_bytes(attention.num_heads * tokens * tokens))
        walk.keep(attention, "q, k, v", operand_bytes(3 * tokens * width))

    walk.hold_residual(attention)
    walk.before(attention, enter)
    linear_bytes = _counted_bytes(sparsity, HALF_BYTES)
    qkv = attention.qkv
    # Read now: while the shapes run, meta tensors that ask for no gradient stand in for the parameters.
    trains = qkv.weight.requires_grad

    def three_linears(x: Tensor, _: Tensor) -> None:
        for role in ("input of q", "input of k", "input of v"):
            walk.touch(qkv, (x.numel() + x.shape[1] * width) * FLOAT_BYTES)
            if trains:
                walk.keep(qkv, role, linear_bytes(x.numel()))

    walk.after(qkv, three_linears)
    _hook_weighted(walk, attention.proj, linear_bytes)


def _hook_mlp(walk: _Walk, mlp: nn.Module, sparsity: float | None) -> None:
    """The GELU's input on entry (never pruned, float16 in a pruned network), then both Linears."""
    gelu_bytes = FLOAT_BYTES if sparsity is None else HALF_BYTES
    walk.hold_residual(mlp)
    walk.before(mlp, lambda x: walk.keep(mlp, "GELU input", x.shape[1] * mlp.fc1.out_features * gelu_bytes))
    for linear in (mlp.fc1, mlp.fc2):
        _hook_weighted(walk, linear, _counted_bytes(sparsity, HALF_BYTES))


def _hook_weighted(walk: _Walk, module: nn.Module, kept_bytes: Callable[[int], float], groups: int = 1) -> None:
    trains = module.weight.requires_grad

    def count(x: Tensor, out: Tensor) -> None:
        walk.touch(module, x.numel() * FLOAT_BYTES + out.numel() * FLOAT_BYTES // groups)
        if trains:
            walk.keep(module, "input", kept_bytes(x.numel()))

    walk.after(module, count)


def _hook_norm(walk: _Walk, module: nn.Module, kept_bytes: Callable[[int], float]) -> None:
    trains = module.weight is not None and module.weight.requires_grad

    def count(x: Tensor) -> None:
        walk.touch(module, x.numel() * FLOAT_BYTES)
        if trains:
            walk.keep(module, "norm input", kept_bytes(x.numel()))

    walk.before(module, count)


def _hook_activation(walk: _Walk, module: nn.Module, bytes_per_element: float) -> None:
    def count(x: Tensor) -> None:
        walk.touch(module, x.numel() * FLOAT_BYTES)
        walk.keep(module, "activation", x.numel() * bytes_per_element)

    walk.before(module, count)


def _fraction_bytes(sparsity: float | None, value_bytes: float) -> Callable[[int], float]:
    """Bytes kept of n elements where the released code multiplies by the nominal share 1 - s."""
    if sparsity is None:
        return lambda n: n * FLOAT_BYTES
    return lambda n: n * ((1 - sparsity) * value_bytes + BITMAP_BYTES)


def _counted_bytes(sparsity: float | None, value_bytes: float) -> Callable[[int], float]:
    """Bytes kept of n elements where the released code counts its mask: n - clip(floor(n s), 1, n) + 1 survive."""
    if sparsity is None:
        return lambda n: n * FLOAT_BYTES
    return lambda n: (n - max(math.floor(n * sparsity), 1) + 1) * value_bytes + n * BITMAP_BYTES


def _trains_below_the_head(model: nn.Module) -> bool:
    """False where the last Linear alone trains: then the released code counts no activation masks."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    head = set(linears[-1].parameters()) if linears else set()
    return any(parameter.requires_grad and parameter not in head for parameter in model.parameters())


def _one_sample(x: Tensor) -> Tensor:
    if x.dim() < 2 or x.shape[0] != 1:
        raise ValueError(
            f"the official formula counts one sample on axis 0, but a layer saw the shape {tuple(x.shape)}"
        )
    return x


def _names(model: nn.Module) -> dict[nn.Module, str]:
    return {module: name or type(model).__name__ for name, module in model.named_modules()}


def _kind(model: nn.Module) -> str:
    return type(model).__name__
