"""Image classification data sets. Plain data only: nothing here knows ``backrazor`` or Hydra."""

from razorlab.data.build import DataBundle, build_data
from razorlab.data.spec import DatasetSpec, LabelledImages, Splits

__all__ = ["DataBundle", "DatasetSpec", "LabelledImages", "Splits", "build_data"]
