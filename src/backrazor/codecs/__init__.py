"""What is stored for backward instead of an activation: codecs turn a tensor into a few small ones, and back."""

from .normalised import AffineLayout, NormCodec
from .products import ConvProduct, LinearProduct, Window
from .pruned import Packed, PackedLayout, Pruned, kept_count, pack
from .roles import mark, role_of
from .rows import RowsLayout, pack_rows, unpack_rows
from .shared import Layout, pack_shared, remember_source, unpack

__all__ = [
    "AffineLayout",
    "ConvProduct",
    "Layout",
    "LinearProduct",
    "NormCodec",
    "Packed",
    "PackedLayout",
    "Pruned",
    "RowsLayout",
    "Window",
    "kept_count",
    "mark",
    "pack",
    "pack_rows",
    "pack_shared",
    "remember_source",
    "role_of",
    "unpack",
    "unpack_rows",
]
