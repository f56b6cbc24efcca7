"""Stands for torch.cuda's graphs on a machine without a GPU, by their semantics.

A graph is the operators that ran while it was captured, and the memory they worked on. A capture changes no memory. A
replay runs the operators again on that memory, and none of the Python between them: a number that Python computed is
what it was. Reading a number during a capture is an error. Memory from outside the capture is not kept alive by the
graph; a replay that finds it gone is an error.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero")
HIDDEN_WRITES = "running_mean", "running_var"  # of native_batch_norm, whose schema does not say so
WORDS = "operation not permitted when stream is capturing"


def _refuse(*_: object) -> None:
    raise RuntimeError(WORDS)


class Outside(NamedTuple):
    """A tensor of memory that was there before the capture."""

    storage: StorageWeakRef
    like: Tensor  # on the meta device: size, stride, type
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> Outside:
        shape = tensor.detach()
        like = torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device="meta")
        return cls(StorageWeakRef(tensor.untyped_storage()), like, tensor.storage_offset())

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, "a graph works on memory that was freed after the capture"
        found = torch.empty(0, dtype=self.like.dtype)
        return found.set_(storage, self.offset, self.like.shape, self.like.stride())


class Graph(TorchDispatchMode):
    """As ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.replays = 0
        self._made: dict[int, Tensor] = {}  # a tensor of each storage that the capture made
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # memory from outside that it would have changed

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function._schema.name in READS:
            _refuse()
        given = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False)) | kwargs
        for argument in function._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if argument.name in given and (written or argument.name in HIDDEN_WRITES):
                self._note_write(given[argument.name])
        result = function(*args, **kwargs)
        given = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _address(leaf) not in given:
                self._made.setdefault(_address(leaf), leaf.detach())
        self.calls.append((function, *tree_map_only(Tensor, self._noted, (args, kwargs)), self._results(result)))
        return result

    def _results(self, result):
        return tree_map_only(Tensor, lambda t: t.detach() if _address(t) in self._made else None, result)

    def _noted(self, tensor: Tensor):
        return tensor.detach() if _address(tensor) in self._made else Outside.of(tensor)

    def _note_write(self, value) -> None:
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor) and _address(leaf) not in self._made:
                whole = torch.empty(0, dtype=torch.uint8).set_(leaf.untyped_storage())
                self._before.setdefault(_address(leaf), (whole, whole.clone()))

    @contextmanager
    def capturing(self):
        random = torch.get_rng_state()
        with ExitStack() as patches:
            for name in ("tolist", "numpy", "item", "__bool__", "__float__", "__int__"):
                patches.enter_context(mock.patch.object(Tensor, name, _refuse))
            with self:
                yield
        for memory, before in self._before.values():
            memory.copy_(before)
        self._before.clear()
        torch.set_rng_state(random)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, before in self.calls:
            args, kwargs = (
                tree_map_only(Outside, lambda o: o.tensor(), value, is_leaf=lambda v: isinstance(v, Outside))
                for value in (args, kwargs)
            )
            result = function(*args, **kwargs)
            for new, old in zip(tree_leaves(result), tree_leaves(before), strict=False):
                if isinstance(old, Tensor) and _address(new) != _address(old):
                    old.copy_(new)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Stream:
    """As ``torch.cuda.Stream``: what waits for what."""

    def __init__(self, calls: list[tuple]) -> None:
        self.calls = calls

    def wait_stream(self, other: Stream) -> None:
        self.calls.append(("waits", self, other))


@contextmanager
def graphs_on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    """Inside, ``torch.cuda`` captures and replays work on the CPU. Yields (the graphs, the calls made)."""
    graphs: list[Graph] = []
    calls: list[tuple] = []
    default = Stream(calls)

    def new_graph() -> Graph:
        graphs.append(Graph())
        return graphs[-1]

    @contextmanager
    def graph(captured: Graph, *, pool, stream: Stream, capture_error_mode: str):
        calls.append(("captures", pool, stream, capture_error_mode))
        with captured.capturing():
            yield

    def on(stream: Stream):
        calls.append(("runs on", stream))
        return nullcontext()

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", new_graph)
        patch.setattr(torch.cuda, "graph", graph)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
        patch.setattr(torch.cuda, "Stream", lambda: Stream(calls))
        patch.setattr(torch.cuda, "stream", on)
        patch.setattr(torch.cuda, "current_stream", lambda: default)
        patch.setattr("backrazor.functional.rest.on_cuda", lambda device: True)
        yield graphs, calls
