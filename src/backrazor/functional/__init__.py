"""One autograd Function an operator: the dense forward, and a backward from what the codecs kept.

Everything kept goes through ``save_for_backward``. Nothing is packed without grad mode or for an operand whose partner needs no gradient.
"""

from .activation import ACTIVATIONS, piecewise_linear, smooth
from .batch_norm import batch_norm
from .conv import conv2d
from .dropout import dropout
from .linear import linear
from .pooling import adaptive_avg_pool2d, max_pool2d
from .scale import channel_scale

__all__ = [
    "ACTIVATIONS",
    "adaptive_avg_pool2d",
    "batch_norm",
    "channel_scale",
    "conv2d",
    "dropout",
    "linear",
    "max_pool2d",
    "piecewise_linear",
    "smooth",
]
