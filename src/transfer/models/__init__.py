"""Plain networks with their pretrained weights. Nothing here knows ``backrazor`` or Hydra."""

from transfer.models.build import Backbone, build_backbone
from transfer.models.deeplab import build_segmenter
from transfer.models.text import build_text_classifier, text_encoder

__all__ = ["Backbone", "build_backbone", "build_segmenter", "build_text_classifier", "text_encoder"]
