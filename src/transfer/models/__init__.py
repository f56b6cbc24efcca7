"""Plain networks with their pretrained weights. Nothing here knows ``backrazor`` or Hydra."""

from transfer.models.build import Backbone, build_backbone, check_image_size

__all__ = ["Backbone", "build_backbone", "check_image_size"]
