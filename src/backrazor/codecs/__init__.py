"""What is stored for backward instead of an activation: codecs turn a tensor into a few small ones, and back."""

from .pruned import Packed, PackedLayout, Pruned, kept_count, pack, pack_shared, unpack
from .roles import mark, role_of

__all__ = ["Packed", "PackedLayout", "Pruned", "kept_count", "mark", "pack", "pack_shared", "role_of", "unpack"]
