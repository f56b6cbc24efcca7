"""The net for the rest: what autograd keeps outside of the drop-ins, while a module runs, is kept small.

``torch.autograd.graph.saved_tensors_hooks`` asks about every tensor that is saved. The razored operators' own tensors
pass untouched, and so do parameters, buffers and views of them, integers, bools, float64, small tensors and whatever
``exactly`` covers. Every other float tensor is kept as ``codecs/rest.py`` says, or in bfloat16 where a code of zero
would be divided by. Hooks that were there before see what is kept here in their turn: the ledger, ``save_on_cpu``, and
activation checkpointing, which drops it.

Autograd does not check versions behind such hooks, so what stays dense is checked here.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..codecs import Packed, role_of
from ..codecs.rest import FORMS, SMALLEST, Blocks, Slice, in_memory_order, pack_blocks, without_copies
from ..codecs.roles import DENSE, QUANTISED, mark
from ..codecs.shared import source_of
from ..kernels.dispatch import on_cuda
from ..kernels.sealed import traced
from ..kernels.topk.layout import NON_FINITE
from .transforms import calls, is_wrapped

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]

REASON = "rest: what autograd keeps beside the drop-ins"
# Where compiled code keeps its tensors, razored ones among them, and checkpointing the inputs that it computes from.
_OPAQUE = ("runtime_wrappers.py", os.path.join("torch", "utils", "checkpoint.py"))


_STAND_INS = FakeTensor, FunctionalTensor  # for the tensors that will be


class _Thread(threading.local):
    """What runs in this thread: the nets, innermost last, and how what is saved now may be kept."""

    def __init__(self) -> None:
        self.nets: list[Net] = []
        self.exact = 0
        self.divisors = 0  # elements of the largest tensor that may be divided by


_thread = _Thread()


class _Dense:
    """A tensor kept as it is; reading it checks, as autograd does, that nobody has written to it since."""

    __slots__ = ("tensor", "version")

    def __init__(self, x: Tensor) -> None:
        # a node that holds its own output through a hook would be a cycle that Python cannot collect
        self.tensor = x.detach() if x.grad_fn is not None else x
        self.version = x._version

    def read(self) -> Tensor:
        if self.tensor._version != self.version:
            kind, shape = self.tensor.type(), list(self.tensor.shape)
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{kind} {shape}] is at version {self.tensor._version}; expected version {self.version} instead"
            )
        return self.tensor


class _Elsewhere:
    """A tensor that the hooks from before keep."""

    __slots__ = ("kept", "unpack")

    def __init__(self, x: Tensor, hooks: Hooks) -> None:
        self.kept, self.unpack = hooks[0](x), hooks[1]

    def read(self) -> Tensor:
        return self.unpack(self.kept)


class _Small:
    """The stored tensors of one packed tensor: shared by all that keep it, as long as one of them lives."""

    __slots__ = ("__weakref__", "_read", "parts")

    def __init__(self, parts: tuple[_Dense | _Elsewhere, ...]) -> None:
        self.parts = parts
        self._read: tuple[Tensor, ...] | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        if self._read is None:  # activation checkpointing gives each of them once
            self._read = tuple(part.read() for part in self.parts)
        return self._read


class _Known(NamedTuple):
    """What is packed of a storage: elements ``start`` to ``stop`` of it. The reference to the storage tells it from one
    that takes its address."""

    storage: StorageWeakRef
    small: weakref.ref[_Small]
    start: int
    stop: int


def _living(known: _Known | None) -> _Small | None:
    return None if known is None or known.storage.expired() else known.small()


class _Packed:
    """A tensor in 8 bits."""

    __slots__ = ("form", "small")

    def __init__(self, small: _Small, form: Blocks | Slice) -> None:
        self.small, self.form = small, form

    def read(self) -> Tensor:
        return self.form.read(*self.small.tensors())


class _Halved:
    """A tensor of 32 bits in bfloat16, repeated to ``shape`` where it is read."""

    __slots__ = ("dtype", "part", "shape")

    def __init__(self, part: _Dense | _Elsewhere, dtype: torch.dtype, shape: torch.Size) -> None:
        self.part, self.dtype, self.shape = part, dtype, shape

    def read(self) -> Tensor:
        return self.part.read().to(self.dtype).expand(self.shape)


class _Sourced:
    """A norm's output, read from what the norm keeps."""

    __slots__ = ("form", "small")

    def __init__(self, small: _Small, packed: Packed) -> None:
        self.small, self.form = small, packed.form

    def read(self) -> Tensor:
        return Packed(self.small.tensors(), self.form).unpack()


def _is_own(x: Tensor) -> bool:
    """Whether a razored operator chose to keep x so. What has a history of its own, as a weight has that the model
    computes, is none of its packed tensors."""
    return calls.own > 0 and (x.grad_fn is None or role_of(x) != (DENSE, ""))


def _is_opaque(caller: CodeType) -> bool:
    """Whether compiled code, checkpointing, or an autograd Function of somebody else's saves the tensor: codes,
    statistics or coordinates, nobody can tell. ``caller`` called what saved it; a Function is called by ``apply``."""
    return "apply" in caller.co_names or caller.co_filename.endswith(_OPAQUE)


def _unpack(kept: Any) -> Tensor:
    return kept.read()


def _top_hooks() -> Hooks | None:
    """The hooks that a tensor saved now would meet."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _hooks_allowed() -> bool:
    """Not under a transform of ``torch.func``, which refuses them."""
    return torch._C._autograd._saved_tensors_hooks_is_enabled()


class Net:
    """One call of a module that keeps small what autograd saves. ``packs`` False: all of it stays as it is.

    ``flag(device)`` gives the status bits for values that 8 bits cannot hold. ``resident()`` gives the tensors that
    live anyway, the parameters and buffers of the model. ``owners()`` gives the settings of the parts of the model that
    have some of their own, by the ids of their parameters.
    """

    def __init__(
        self,
        packs: bool,
        settings: Any,
        flag: Callable[[torch.device], Tensor],
        resident: Callable[[], Iterable[Tensor]],
        owners: Callable[[], dict[int, Any]] = dict,
    ) -> None:
        self.packs, self.settings = packs, settings
        self._flag, self._resident_tensors = flag, resident
        self._owners_of_parameters = owners
        self._owners: dict[int, Any] | None = None
        self._resident: set[int] | None = None
        self._known: dict[tuple, _Known] = {}
        self._ranges: dict[tuple, _Known] = {}  # the largest part of each storage that is packed
        self._held: list[_Small] = []
        self._outer: Hooks | None = None
        self._pack_hook = self._pack
        self._top: Callable | None = None

    def __enter__(self) -> Net:
        top = _top_hooks()
        nets = _thread.nets
        covers = bool(nets) and nets[-1]._pushes and top is not None and top[0] is nets[-1]._pack_hook
        self._outer = nets[-1]._outer if covers else top
        self._pushes = (self.packs or covers) and _hooks_allowed()
        if self._pushes:
            torch._C._autograd._push_saved_tensors_default_hooks(self._pack_hook, _unpack)
        self._top = self._pack_hook if self._pushes else None if top is None else top[0]
        nets.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _thread.nets.pop()
        if self._pushes:
            torch._C._autograd._pop_saved_tensors_default_hooks()
        self._known.clear()
        self._ranges.clear()
        self._held.clear()

    def settings_for(self, *tensors: Any) -> Any:
        """The settings that hold for a function of ``tensors``: of the part of the model that owns the first parameter
        among them, or view of one, where such a part has some of its own; else those of the module that runs."""
        for x in tensors:
            if isinstance(x, Tensor) and self.is_parameter(x):
                return self._owner_of(x if x._base is None else x._base) or self.settings
        return self.settings

    def _owner_of(self, parameter: Tensor) -> Any:
        if self._owners is None:
            self._owners = self._owners_of_parameters()
        return self._owners.get(id(parameter))

    def hooks_outside(self) -> Hooks | None:
        """The hooks from before, to which these hand on what they keep."""
        return self._outer

    def _is_on_top(self) -> bool:
        top = _top_hooks()
        return self._top is (None if top is None else top[0])

    def _pack(self, x: Tensor) -> Any:
        if self.packs and not _thread.exact and x.dtype in FORMS and x.numel() >= SMALLEST and not _is_own(x):
            kept = self._packed(x)
            if kept is not None:
                return kept
        return self._as_it_is(x)

    def _as_it_is(self, x: Tensor) -> _Dense | _Elsewhere:
        return _Dense(x) if self._outer is None else _Elsewhere(x, self._outer)

    def _packed(self, x: Tensor) -> _Packed | _Halved | _Sourced | None:
        """x kept small, or None where it is to stay as it is."""
        plain = type(x) is Tensor or isinstance(x, _STAND_INS)
        if not plain or x.layout != torch.strided or self._lives_anyway(x) or role_of(x)[0] != DENSE:
            return None
        if _is_opaque(sys._getframe(2).f_code):
            return None
        compact = without_copies(x.detach())
        if compact.numel() < SMALLEST:
            return None
        if compact.numel() <= _thread.divisors:
            if x.element_size() == 2:
                return None
            half = mark(compact.to(torch.bfloat16), QUANTISED, REASON)
            return _Halved(self._as_it_is(half), x.dtype, x.shape)
        source = source_of(x)
        if source is not None:
            return _Sourced(_Small(tuple(map(self._as_it_is, source.tensors))), source)
        return self._stored(x, compact)

    def _stored(self, x: Tensor, compact: Tensor) -> _Packed | None:
        """x in blocks: what is stored of it once for all views of the same elements, in whatever shape they are, and of
        a part of something that is stored nothing more. ``compact``: x without repetitions."""
        start, storage = compact.storage_offset(), compact.untyped_storage()
        stop = (
            start + sum((size - 1) * stride for size, stride in zip(compact.shape, compact.stride(), strict=True)) + 1
        )
        is_whole = in_memory_order(compact) is not None
        content = storage._cdata, x.dtype, x._version
        key = (*content, *map(_hashable, (start, stop, *(() if is_whole else (*compact.shape, *compact.stride())))))
        small = _living(self._known.get(key))
        if small is not None:
            return _Packed(small, Blocks.of(x))
        around = self._ranges.get(content)
        small = _living(around)
        if small is not None and around.start <= start and stop <= around.stop:
            place = tuple(compact.shape), tuple(x.shape), tuple(compact.stride()), start - around.start
            return _Packed(small, Slice(*place, x.dtype))
        codes, scales = pack_blocks(x, REASON)
        if not self._holds(scales):
            return None
        small = _Small((self._as_it_is(codes), self._as_it_is(scales)))
        if self._outer is not None:
            self._held.append(small)  # what hooks from before keep is asked for alike in a recomputation
        self._known[key] = known = _Known(StorageWeakRef(storage), weakref.ref(small), start, stop)
        if is_whole and (_living(around) is None or stop - start > around.stop - around.start):
            self._ranges[content] = known
        return _Packed(small, Blocks.of(x))

    def _holds(self, scales: Tensor) -> bool:
        """Whether 8 bits hold what these are the scales of. What they do not hold stays dense; but on CUDA asking
        would wait for the device, so a flag is raised there, which ``check_finite`` reads."""
        if isinstance(scales, FakeTensor):
            return True
        if not traced() and scales.device.type == "cpu" and not on_cuda(scales.device):
            return bool(scales.isfinite().all())
        self._flag(scales.device).bitwise_or_(NON_FINITE * (~scales.isfinite()).any().to(torch.int32))
        return True

    def _lives_anyway(self, x: Tensor) -> bool:
        """Whether x is a parameter, a buffer or a view of one."""
        if self.is_parameter(x):
            return True
        return x.grad_fn is None and x.untyped_storage()._cdata in self._living()

    def is_parameter(self, x: Tensor) -> bool:
        """Whether x is a parameter or a view of one. Not any leaf that learns: in a recomputation what a checkpointed
        part was given is one, where it was none in the forward."""
        base = x if x._base is None else x._base
        if isinstance(base, nn.Parameter):
            return True
        if is_wrapped(base):  # of a transform, which has no storage
            return False
        return base.is_leaf and base.requires_grad and base.untyped_storage()._cdata in self._living()

    def _living(self) -> set[int]:
        """The storages of what lives anyway."""
        if self._resident is None:
            self._resident = {t.untyped_storage()._cdata for t in self._resident_tensors()}
        return self._resident


def _storage_of(x: Tensor) -> int | None:
    """What tells the storage of x; None where x belongs to a transform of ``torch.func`` and has none."""
    return None if _functorch.is_functorch_wrapped_tensor(x) else x.untyped_storage()._cdata


class TracedNet(Net):
    """The net of a module that ``torch.compile`` traces: what autograd would save is packed in the graph itself.

    The compiler switches hooks off while it traces, to call them when the graph runs. The outermost net of a trace
    switches them on again: there is nothing else to be called, since hooks from outside are left out. What stands for a
    parameter is neither one nor a leaf there, so that ``parameters`` are told by their storage. ``owners``: the
    settings of the parts that own them, where these have some of their own.
    """

    def __init__(
        self,
        packs: bool,
        settings: Any,
        flag: Callable[[torch.device], Tensor],
        parameters: Sequence[Tensor],
        owners: Sequence[Any],
        buffers: Sequence[Tensor],
    ) -> None:
        super().__init__(packs, settings, flag, lambda: (*parameters, *buffers))
        self._parameters = {t.untyped_storage()._cdata: owner for t, owner in zip(parameters, owners, strict=True)}
        self._resident = {t.untyped_storage()._cdata for t in (*parameters, *buffers)}

    def _owner_of(self, parameter: Tensor) -> Any:
        return self._parameters[parameter.untyped_storage()._cdata]

    def _lives_anyway(self, x: Tensor) -> bool:
        return _storage_of(x) in self._resident

    def is_parameter(self, x: Tensor) -> bool:
        """Whether x is a parameter or a view of one."""
        return _storage_of(x) in self._parameters

    def __enter__(self) -> TracedNet:
        super().__enter__()
        if not isinstance(_thread.nets[-2] if len(_thread.nets) > 1 else None, TracedNet):
            self._outer = None
        self._tracing = torch._C._autograd._saved_tensors_hooks_set_tracing(False)
        return self

    def __exit__(self, *_: object) -> None:
        torch._C._autograd._saved_tensors_hooks_set_tracing(self._tracing)
        super().__exit__()


def _hashable(size: Any) -> Any:
    """A size as part of a key; open ones are told by their formula."""
    return size if isinstance(size, int) else str(size)


def running() -> Net | None:
    """The net that a tensor saved now would fall into, or None: no razored module runs, or somebody else's hooks came
    between, as those of activation checkpointing do."""
    net = _thread.nets[-1] if _thread.nets else None
    if net is None or isinstance(net, TracedNet) != traced():
        return None
    return net if net._is_on_top() else None


@contextmanager
def exactly() -> Iterator[None]:
    """What is saved inside stays dense."""
    _thread.exact += 1
    try:
        yield
    finally:
        _thread.exact -= 1


@contextmanager
def dividing(largest: int) -> Iterator[None]:
    """What is saved inside may be divided by in backward, up to tensors of ``largest`` elements: these keep 16 bits,
    which keep a small number from becoming zero."""
    before, _thread.divisors = _thread.divisors, largest
    try:
        yield
    finally:
        _thread.divisors = before
