"""What autograd really holds: every saved tensor, one storage counted once, by module and by role."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..codecs import role_of
from ..hooks import passive


@dataclass(frozen=True)
class LedgerRow:
    """Bytes that one module keeps in one role. ``reason`` says why a dense tensor is dense."""

    module: str
    role: str
    bytes: int
    reason: str = ""


TOO_LATE = (
    "the ledger is empty: the graph was gone before it was read, for the loss was not kept, or backward ran inside the "
    "context; keep it: with ledger(model) as book: loss = loss_fn(model(x), y)"
)


class _Held:
    """Stands for a saved tensor in the graph: as long as the graph holds it, so does the graph the tensor."""

    __slots__ = ("__weakref__", "module", "reason", "role", "tensor")

    def __init__(self, tensor: Tensor, module: str, role: str, reason: str) -> None:
        self.tensor, self.module, self.role, self.reason = tensor, module, role, reason


def storage_key(tensor: Tensor) -> int:
    """What two tensors on the same memory share."""
    return tensor.untyped_storage()._cdata


class Ledger:
    """The saved tensors of one forward pass. Read it while the graph lives: before ``backward``, or at any time after
    leaving the context, when the rows were taken."""

    def __init__(self, model: nn.Module) -> None:
        self._resident = {storage_key(t): t for t in (*model.parameters(), *model.buffers())}
        self._held: list[weakref.ref[_Held]] = []
        self._module: list[str] = [""]
        self._types: dict[str, str] = {name: type(module).__name__ for name, module in model.named_modules()}
        self._rows: list[LedgerRow] | None = None
        self._parameter_bytes = 0
        self.too_late = False  # tensors were saved, but the graph was gone when the rows were taken

    def _pack(self, tensor: Tensor) -> _Held:
        role, reason = role_of(tensor)
        module = self._module[-1]
        if not reason and role == "dense":
            reason = f"saved by {self._types.get(module, 'the loss')}"
        # A node that holds its own output through this hook would be a cycle that Python cannot collect, so what has a
        # node is held detached. What has none (packed tensors) is held as the very object that other layers look for.
        held = _Held(tensor.detach() if tensor.grad_fn is not None else tensor, module, role, reason)
        self._held.append(weakref.ref(held))
        return held

    def take(self) -> list[LedgerRow]:
        """Take the rows now, while the graph lives, unless they have been taken. Returns them."""
        if self._rows is None:
            self._rows = self._counted()
        return self._rows

    def _counted(self) -> list[LedgerRow]:
        seen: set[int] = set()
        totals: dict[tuple[str, str, str], int] = {}
        resident: set[int] = set()
        living = [held for reference in self._held if (held := reference()) is not None]
        self.too_late = bool(self._held) and not living
        for held in living:
            key = storage_key(held.tensor)
            if key in self._resident:
                if key not in resident:
                    resident.add(key)
                    self._parameter_bytes += held.tensor.untyped_storage().nbytes()
                continue
            if key in seen:
                continue
            seen.add(key)
            row = held.module, held.role, held.reason
            totals[row] = totals.get(row, 0) + held.tensor.untyped_storage().nbytes()
        return [LedgerRow(module, role, size, reason) for (module, role, reason), size in totals.items() if size]

    @property
    def rows(self) -> list[LedgerRow]:
        """One row per module and role, in the order of the forward pass."""
        return self.take()

    @property
    def total_bytes(self) -> int:
        """Bytes held for backward, without parameters and buffers."""
        return sum(row.bytes for row in self.rows)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of parameters and buffers that the graph also refers to; they are resident anyway."""
        self.take()
        return self._parameter_bytes

    def by_role(self) -> dict[str, int]:
        """Bytes per role, largest first."""
        return _grouped((row.role, row.bytes) for row in self.rows)

    def by_module(self) -> dict[str, int]:
        """Bytes per module, largest first; "" is what was saved outside any module, such as by the loss."""
        return _grouped((row.module, row.bytes) for row in self.rows)

    def table(self, rows: int | None = None) -> str:
        """The ledger for a person, largest first, the sum at the bottom. MB = 1e6 bytes.

        Where the graph was gone before the ledger was read, the table is the sentence that says so.
        """
        if not self.rows and self.too_late:
            return TOO_LATE
        ordered = sorted(self.rows, key=lambda row: -row.bytes)
        shown = ordered if rows is None else ordered[:rows]
        lines = [f"{'MB':>10}  {'module':40} {'role':14} reason"]
        lines += [
            f"{row.bytes / 1e6:10.3f}  {row.module or '(outside)':40} {row.role:14} {row.reason}" for row in shown
        ]
        if len(shown) < len(ordered):
            rest = sum(row.bytes for row in ordered[len(shown) :])
            lines.append(f"{rest / 1e6:10.3f}  {len(ordered) - len(shown)} smaller rows")
        apart = f"{self.parameter_bytes / 1e6:.3f} of parameters and buffers apart"
        lines.append(f"{self.total_bytes / 1e6:10.3f}  saved in all; {apart}")
        return "\n".join(lines)


def _grouped(pairs: Iterator[tuple[str, int]]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for key, size in pairs:
        totals[key] = totals.get(key, 0) + size
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _leave(book: Ledger) -> None:
    book._module.pop()


@contextmanager
def ledger(model: nn.Module) -> Iterator[Ledger]:
    """Record what autograd saves inside the context: ``with ledger(model) as book: loss = loss_fn(model(x), y)``.

    Rows are taken when the context ends, or earlier when they are read. Tensors whose part of the graph was dropped in
    between do not count. Under activation checkpointing the outer graph holds the blocks' inputs, and those are what is
    counted.

    Warns:
        UserWarning: tensors were saved, but none is held any more when the context ends: nobody kept the loss.
    """
    book = Ledger(model)
    with ExitStack() as stack:
        for name, module in list(model.named_modules())[1:]:  # the model's own name is where the book begins
            enter = module.register_forward_pre_hook(passive(lambda *_, name=name: book._module.append(name)))
            leave = module.register_forward_hook(passive(lambda *_: _leave(book)), always_call=True)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(book._pack, lambda held: held.tensor))
        yield book
        book.take()
    if book.too_late:
        warnings.warn(TOO_LATE, stacklevel=3)
