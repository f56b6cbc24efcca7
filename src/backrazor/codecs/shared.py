"""Inputs that several layers consume, inputs that a norm or an attention before has kept already, and inputs that an
activation made.

All are told by the tensor itself: what is known of it lies beside the tensor object, in a dictionary with weak keys,
and counts while its version is the same. What several layers share is held weakly, so that its memory belongs to the
autograd graph alone. What a norm has kept is held while its output lives.

Under activation checkpointing the forward and its recomputation have to choose alike. The graph drops at once what the
forward saves, and the recomputation gets objects of its own for what was made before it. So a note counts only under
the saved-tensor hooks under which it was made: nothing that was made outside of a checkpointed part is known inside.

While ``torch.compile`` traces, the same is told of the tensors that stand for those that will run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from ..kernels.sealed import traced
from .derivative import DerivativeForm, Half, Levels
from .inputs import Activation, Use, pack_input
from .packed import Packed
from .pruned import Pruned
from .roles import mark

_SOURCES = WeakTensorKeyDictionary()  # a norm's output -> when, what the norm keeps
_ACTIVATED = WeakTensorKeyDictionary()  # an activation's output -> when, what is known of it
_ATTENDED = WeakTensorKeyDictionary()  # an attention's output -> when, what the attention keeps
_PACKED = WeakTensorKeyDictionary()  # an input -> codec and when, weak references to what was packed, its form

_HOOKS: WeakKeyDictionary[Callable, int] = WeakKeyDictionary()  # a number for each: a note must not keep them alive
_numbers = count(1)


def _place() -> int:
    """A number for the saved-tensor hooks that what is saved now meets, beside those of this library's nets; 0 where
    there are none, and under a compiler, which recomputes in its graph."""
    hooks = None if traced() else torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None:  # a net's hooks stand before those from outside
        hooks = getattr(getattr(hooks[0], "__self__", None), "hooks_outside", lambda: hooks)()
    if hooks is None:
        return 0
    try:
        number = _HOOKS.get(hooks[0])
        if number is None:
            number = _HOOKS[hooks[0]] = next(_numbers)
    except TypeError:  # no weak reference to it, or no hash
        return id(hooks[0])
    return number


def _when(x: Tensor) -> tuple[int, int]:
    """What has to be the same for a note of x to count: its version, and the hooks that see what is saved."""
    return x._version, _place()


def remember_source(x: Tensor, packed: Packed) -> None:
    """Note that x, a norm's output, can be read from what the norm keeps."""
    _SOURCES[x] = _when(x), packed


def source_of(x: Tensor) -> Packed | None:
    """What the norm that x comes from keeps of it, or None."""
    when, packed = _SOURCES.get(x, (None, None))
    return packed if when is not None and when == _when(x) else None


def source_of_weight(weight: Tensor) -> Packed | None:
    """What a weight that the network has computed can be worked out from again: it, or what it is a view of, in the
    same order."""
    base = weight._base
    viewed = base is not None and weight.is_contiguous() and weight.numel() == base.numel()
    return source_of(weight) or (source_of(base) if viewed else None)


def remember_attended(x: Tensor, packed: Packed) -> None:
    """Note that the tokens (B, N, H e) which are a view of x (B, H, N, e), an attention's output, can be read from what
    the attention keeps."""
    if not x.is_inference():
        _ATTENDED[x] = _when(x), packed


def _attended_of(x: Tensor) -> Packed | None:
    """What the attention keeps whose output x (B, ..., I) is a view of, all of it and in the order of its tokens."""
    if x._base is None or not x.is_contiguous():
        return None
    when, packed = _ATTENDED.get(x._base, (None, None))
    if when is None or when != _when(x) or packed.form.shape != tuple(x.shape):
        return None
    return packed


def is_kept_by_another(x: Tensor) -> bool:
    """Whether x can be read from what the norm or the attention keeps that it comes from."""
    return source_of(x) is not None or _attended_of(x) is not None


def remember_activation(x: Tensor, codes: Packed | None = None) -> None:
    """Note that x is the output of an activation. ``codes``: what its backward keeps, where they tell of the elements
    of x themselves."""
    if not x.is_inference():  # whose version nobody counts
        _ACTIVATED[x] = _when(x), Activation(codes)


def activation_of(x: Tensor) -> Activation | None:
    """What is known of the activation that x comes from; None where it comes from none."""
    known = _activation_or_parts(x)
    if not isinstance(known, _Parts):
        return known
    whole = known.joined()
    _ACTIVATED[x] = _when(x), whole
    return whole


def _activation_or_parts(x: Tensor) -> Activation | _Parts | None:
    if x.is_inference():
        return None
    when, known = _ACTIVATED.get(x, (None, None))
    return known if when is not None and when == _when(x) else None


class _Parts(NamedTuple):
    """What is known of an activation's output in ``bounds`` (start, stop) over its samples, part by part."""

    bounds: tuple[tuple[int, int], ...]
    activations: tuple[Activation, ...]

    def joined(self) -> Activation:
        """The same as one, in memory of its own."""
        parts = [activation.codes for activation in self.activations]
        kinds = {None if p is None else (type(p.form), getattr(p.form, "codec", None), p.form.shape[1:]) for p in parts}
        if len(kinds) > 1 or not all(isinstance(p.form, DerivativeForm) for p in parts if p is not None):
            return Activation(None)
        first = parts[0]
        if first is None or isinstance(first.form.codec, Half):
            return Activation(None)
        codes = mark(torch.cat([p.tensors[0] for p in parts]), first.form.codec.role)
        return Activation(Packed((codes,), replace(first.form, shape=(len(codes), *first.form.shape[1:]))))


def remember_activations_of_parts(x: Tensor, bounds: Sequence[tuple[int, int]], known: list[Activation | None]) -> None:
    """Note that the samples of x in each of ``bounds`` are such outputs of an activation; nothing if one is not."""
    found = tuple(activation for activation in known if activation is not None)
    if len(found) == len(known) and not x.is_inference():
        _ACTIVATED[x] = _when(x), _Parts(tuple(bounds), found)


def remember_activation_of_part(x: Tensor, part: Tensor, start: int, stop: int) -> None:
    """Note of ``part``, the samples start to stop of x (B, ...), what is known of x as an activation's output."""
    known = _activation_or_parts(x)
    if isinstance(known, _Parts):
        if (start, stop) in known.bounds:
            remember_activation(part, known.activations[known.bounds.index((start, stop))].codes)
            return
        known = activation_of(x)
    if known is not None:
        remember_activation(part, _codes_of_part(known.codes, start, stop))


def _codes_of_part(codes: Packed | None, start: int, stop: int) -> Packed | None:
    form = None if codes is None else codes.form
    if not isinstance(form, DerivativeForm) or isinstance(form.codec, Half):
        return None
    part = mark(codes.tensors[0][start:stop], form.codec.role)
    return Packed((part,), replace(form, shape=(stop - start, *form.shape[1:])))


def hand_on_activation(x: Tensor, out: Tensor, scaled: bool = False) -> None:
    """Note that ``out`` has the elements of an activation if x has: some of them, or all of them ``scaled``. The codes
    of a smooth activation tell of those, too."""
    known = activation_of(x)
    if known is not None:
        remember_activation(out, known.codes if scaled and isinstance(known.of(out), Levels) else None)


def _remember_packed(x: Tensor, choice: tuple[Pruned, Use], packed: Packed) -> None:
    references = tuple(TensorWeakRef(tensor) for tensor in packed.tensors)
    _PACKED[x] = (choice, _when(x)), references, packed.form


def _packed_before(x: Tensor, choice: tuple[Pruned, Use]) -> Packed | None:
    known = _PACKED.get(x)
    if known is None or known[0] != (choice, _when(x)):
        return None
    tensors = tuple(reference() for reference in known[1])
    return None if any(tensor is None for tensor in tensors) else Packed(tensors, known[2])


def pack_shared(x: Tensor, codec: Pruned, use: Use, flag: Tensor, given: Tensor | None = None) -> Packed:
    """What stands for x (B, ...) in the gradient of a weight that reads it as ``use`` says: the norm's codes if x comes
    straight from a quantised norm (no bytes at all), what an earlier consumer of the same kind has packed, or else
    ``pack_input``. ``given``: the tensor that x is a view of, which notes are about."""
    given = x if given is None else given
    choice = codec, use
    packed = source_of(x)
    if packed is None and codec.guesses:
        packed = _attended_of(x)
    packed = packed or _packed_before(x, choice)
    if packed is None:
        activation = None if codec.fill == "zero" else activation_of(given)  # which then decides nothing
        packed = pack_input(x, codec, use, activation, flag)
        _remember_packed(x, choice, packed)
    return packed
