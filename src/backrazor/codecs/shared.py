"""Inputs that several layers consume, inputs that a norm or an attention before has kept already, and inputs that an
activation made.

All are told by the tensor itself: what is known of it lies beside the tensor object, in a dictionary with weak keys,
and counts while its version is the same. What several layers share is held weakly, so that its memory belongs to the
autograd graph alone. What a norm has kept is held while its output lives: under activation checkpointing the graph
drops it at once, and the forward and its recomputation have to choose alike. While ``torch.compile`` traces, the same
is told of the tensors that stand for those that will run.
"""

from __future__ import annotations

from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from .inputs import Activation, Use, pack_input
from .packed import Packed
from .pruned import Pruned

_SOURCES = WeakTensorKeyDictionary()  # a norm's output -> its version, what the norm keeps
_ACTIVATED = WeakTensorKeyDictionary()  # an activation's output -> its version, what is known of it
_ATTENDED = WeakTensorKeyDictionary()  # an attention's output -> its version, what the attention keeps
_PACKED = WeakTensorKeyDictionary()  # an input -> codec and version, weak references to what was packed, its form


def remember_source(x: Tensor, packed: Packed) -> None:
    """Note that x, a norm's output, can be read from what the norm keeps."""
    _SOURCES[x] = x._version, packed


def source_of(x: Tensor) -> Packed | None:
    """What the norm that x comes from keeps of it, or None."""
    version, packed = _SOURCES.get(x, (None, None))
    return packed if version == x._version else None


def remember_attended(x: Tensor, packed: Packed) -> None:
    """Note that the tokens (B, N, H e) which are a view of x (B, H, N, e), an attention's output, can be read from what
    the attention keeps."""
    if not x.is_inference():
        _ATTENDED[x] = x._version, packed


def _attended_of(x: Tensor) -> Packed | None:
    """What the attention keeps whose output x (B, ..., I) is a view of, all of it and in the order of its tokens."""
    if x._base is None or not x.is_contiguous():
        return None
    version, packed = _ATTENDED.get(x._base, (None, None))
    if version != x._version or packed.form.shape != tuple(x.shape):
        return None
    return packed


def remember_activation(x: Tensor, codes: Packed | None = None) -> None:
    """Note that x is the output of an activation. ``codes``: what its backward keeps, where they tell of the elements
    of x themselves."""
    if not x.is_inference():  # whose version nobody counts
        _ACTIVATED[x] = x._version, Activation(codes)


def activation_of(x: Tensor) -> Activation | None:
    """What is known of the activation that x comes from; None where it comes from none."""
    if x.is_inference():
        return None
    version, known = _ACTIVATED.get(x, (None, None))
    return known if version == x._version else None


def hand_on_activation(x: Tensor, out: Tensor) -> None:
    """Note that ``out`` has the elements of an activation if x has: some of them, or scaled ones."""
    if activation_of(x) is not None:
        remember_activation(out)


def _remember_packed(x: Tensor, choice: tuple[Pruned, Use], packed: Packed) -> None:
    references = tuple(TensorWeakRef(tensor) for tensor in packed.tensors)
    _PACKED[x] = (choice, x._version), references, packed.form


def _packed_before(x: Tensor, choice: tuple[Pruned, Use]) -> Packed | None:
    known = _PACKED.get(x)
    if known is None or known[0] != (choice, x._version):
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
