"""Plain networks with their pretrained weights. Nothing here knows ``backrazor`` or Hydra."""

from razorlab.models.build import Backbone, build_backbone
from razorlab.models.deeplab import build_segmenter
from razorlab.models.text import build_text_classifier, text_encoder

__all__ = ["Backbone", "build_backbone", "build_segmenter", "build_text_classifier", "text_encoder"]
