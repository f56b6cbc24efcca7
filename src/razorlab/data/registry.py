"""The data sets, by the name that ``data=`` takes."""

from razorlab.data import digits, folder, published, scenes
from razorlab.data.spec import DatasetSpec

DATASETS: dict[str, DatasetSpec] = {
    "digits": DatasetSpec(load=digits.load),
    "folder": DatasetSpec(load=folder.load),
    "scenes": DatasetSpec(load=scenes.load),
    **dict.fromkeys(published.PUBLISHED, DatasetSpec(load=published.load)),
}
