"""Image classification data sets. Plain data only: nothing here knows ``backrazor`` or Hydra."""

from transfer.data.build import DataBundle, build_data
from transfer.data.spec import DatasetSpec, LabelledImages, Splits

__all__ = ["DataBundle", "DatasetSpec", "LabelledImages", "Splits", "build_data"]
