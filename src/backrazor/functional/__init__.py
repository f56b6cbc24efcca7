"""One autograd Function per operator: the dense forward, and a backward from what the codecs kept.

Everything kept goes through ``save_for_backward``. Nothing is packed without grad mode or for an operand whose partner
needs no gradient.
"""

from ..codecs.smooth import ACTIVATIONS
from .activation import piecewise_linear, smooth
from .attention import AttentionCodec, attention
from .batch_norm import batch_norm
from .conv import conv2d
from .conv_norm_act import conv_norm_act
from .convnd import ConvNdSpec, conv_nd
from .cross_entropy import linear_cross_entropy, upsampled_cross_entropy
from .dropout import dropout
from .extreme import extreme
from .gated_product import gated_product
from .layer_norm import group_norm, layer_norm
from .linear import linear
from .linear_act import linear_act
from .pooling import adaptive_avg_pool2d, avg_pool2d, max_pool
from .rms_norm import rms_norm
from .scale import channel_scale
from .sdpa import fits as fits_attention
from .sdpa import sdpa

__all__ = [
    "ACTIVATIONS",
    "AttentionCodec",
    "ConvNdSpec",
    "adaptive_avg_pool2d",
    "attention",
    "avg_pool2d",
    "batch_norm",
    "channel_scale",
    "conv2d",
    "conv_nd",
    "conv_norm_act",
    "dropout",
    "extreme",
    "fits_attention",
    "gated_product",
    "group_norm",
    "layer_norm",
    "linear",
    "linear_act",
    "linear_cross_entropy",
    "max_pool",
    "piecewise_linear",
    "rms_norm",
    "sdpa",
    "smooth",
    "upsampled_cross_entropy",
]
