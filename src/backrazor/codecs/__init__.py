"""What is stored for backward instead of an activation: codecs turn a tensor into a few small ones, and back."""

from ..kernels.operators import scratch_of
from .derivative import Bits, Derivative, Half, Levels, pack_derivative, smooth_codec, smooth_word, times
from .inputs import CHANNELS, FEATURES, Use
from .normalised import AffineForm, NormCodec
from .packed import NOTHING, Form, Packed, all_packed_of, load, packed_of, save, save_outputs
from .products import ConvProduct, LinearProduct, Window
from .pruned import Pruned, PrunedForm, kept_count, pack, whole_values
from .ranged import Ranged
from .roles import mark, role_of
from .rows import Rows
from .shared import (
    activation_of,
    hand_on_activation,
    pack_shared,
    remember_activation,
    remember_attended,
    remember_source,
    source_of_weight,
)
from .standardised import standardised

__all__ = [
    "CHANNELS",
    "FEATURES",
    "NOTHING",
    "AffineForm",
    "Bits",
    "ConvProduct",
    "Derivative",
    "Form",
    "Half",
    "Levels",
    "LinearProduct",
    "NormCodec",
    "Packed",
    "Pruned",
    "PrunedForm",
    "Ranged",
    "Rows",
    "Use",
    "Window",
    "activation_of",
    "all_packed_of",
    "hand_on_activation",
    "kept_count",
    "load",
    "mark",
    "pack",
    "pack_derivative",
    "pack_shared",
    "packed_of",
    "remember_activation",
    "remember_attended",
    "remember_source",
    "role_of",
    "save",
    "save_outputs",
    "scratch_of",
    "smooth_codec",
    "smooth_word",
    "source_of_weight",
    "standardised",
    "times",
    "whole_values",
]
