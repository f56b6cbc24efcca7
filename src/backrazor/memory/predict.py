"""Memory predicted from shapes: the step runs on fake tensors, which have shapes and storages but no data, and never
touches a kernel."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..codecs import scratch_of
from .ledger import LedgerRow, ledger
from .release import GradientRelease, state_bytes


@dataclass(frozen=True)
class Prediction:
    """What a training step holds, in four parts, and what autograd saves of it.

    saved_bytes: held by autograd at the end of forward. peak_bytes: highest during the step above the three parts below
        and the input batch. rows: as the ledger's. weight_bytes: parameters and buffers. gradient_bytes: of what
        trains; 0 where they are released. optimizer_bytes: the optimizer's state; 0 without one.
    """

    saved_bytes: int
    peak_bytes: int
    rows: tuple[LedgerRow, ...]
    weight_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The sum of the four parts; the input batch is apart."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.peak_bytes


def predict(
    model: nn.Module,
    input_size: tuple[int, ...] = (3, 224, 224),
    batch_size: int = 1,
    rule: str = "exact",
    loss_fn: Callable[[Tensor], Tensor] | None = None,
    autocast: torch.dtype | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    release_gradients: bool = False,
) -> Prediction:
    """Predict the memory of a training step of ``model``, razored or not, on an input of (batch_size, *input_size)
    float32.

    No activation is allocated and the model is not changed. What packing takes in passing is counted for a model on
    CUDA. On the CPU it is not: a few MiB, or a sample's gradient in float32 where that is more. ``loss_fn`` maps the
    model's output to a scalar; by default cross-entropy for logits (B, classes), the mean otherwise. ``autocast`` gives
    the type of an autocast region around the forward.

    Args:
        rule: "exact": equal to the ledger to the byte. There is no other.
        optimizer: of the model's parameters. Its state is counted as its first step makes it, and what its step takes
            in passing is in the peak. It is not changed.
        release_gradients: the step of ``GradientRelease``, which needs an optimizer.

    Raises:
        ValueError: another rule, or gradients released without an optimizer. The formula of the paper's released code
            is ``razorlab.official`` of the laboratory.
    """
    if rule == "official":
        raise ValueError(
            "rule='official' has left the library: use razorlab.official.official_memory(model, input_size, batch_size)"
        )
    if rule != "exact":
        raise ValueError(f"rule={rule!r} is not known: use 'exact'")
    if release_gradients and optimizer is None:
        raise ValueError("release_gradients=True needs the optimizer that takes the gradients")
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        state = {name: _fake(fake, tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        trained = [tensor for tensor in state.values() if tensor.requires_grad]
        for tensor in trained:
            tensor.grad = torch.zeros_like(tensor)
        stepping = None if optimizer is None else _on_fakes(optimizer, model, state)
        if stepping is not None:
            stepping.step()  # makes its state
        if stepping is not None and release_gradients:
            GradientRelease(stepping)
            for tensor in trained:
                tensor.grad = None
        device = next(iter(state.values())).device if state else torch.device("cpu")
        batch = torch.empty(batch_size, *input_size, device=device)
        shell = _Shell(model, state)
        with ledger(shell) as book, _Allocations() as allocations:
            with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
                output = torch.func.functional_call(model, state, (batch,))
            loss = (loss_fn or _default_loss)(output)
            del output
            rows = tuple(book.rows)
            if loss.requires_grad:
                loss.backward()
            if stepping is not None:
                stepping.step()
        state_size = 0 if stepping is None else state_bytes(stepping)
    return Prediction(
        sum(row.bytes for row in rows),
        allocations.peak,
        rows,
        weight_bytes(model),
        0 if release_gradients else gradient_bytes(model),
        state_size,
    )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers, one storage counted once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients of all that trains."""
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


def _on_fakes(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, Tensor]) -> torch.optim.Optimizer:
    """An optimizer like ``optimizer`` over the fake parameters, with no state yet."""
    fakes = {id(parameter): state[name] for name, parameter in model.named_parameters()}
    twin = object.__new__(type(optimizer))
    # a schedule puts a step of its own there, which is bound to the other one
    twin.__dict__.update({key: value for key, value in optimizer.__dict__.items() if key != "step"})
    twin.state = defaultdict(dict)
    twin.param_groups = [
        {**group, "params": [fakes[id(p)] for p in group["params"] if id(p) in fakes]}
        for group in optimizer.param_groups
    ]
    return twin


def _fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    return mode.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad)


class _Shell(nn.Module):
    """What the ledger needs to see: the model's modules, and the fake state in place of its parameters."""

    def __init__(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        super().__init__()
        self._names = list(model.named_modules())
        self._state = state

    def named_modules(self, *_args: Any, **_kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        return iter(self._names)

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        return iter(self._state.values())

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        return iter(())


def _default_loss(output: Tensor) -> Tensor:
    if output.dim() == 2:
        return F.cross_entropy(output, torch.zeros(output.shape[0], dtype=torch.long, device=output.device))
    return output.float().mean()


class _Allocations(TorchDispatchMode):
    """Live bytes of the storages that operators make while the mode is on, and their highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in before and storage._cdata not in self._known:
                    self._add(storage)
        self.peak = max(self.peak, self.live + scratch_of(function, args))
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
