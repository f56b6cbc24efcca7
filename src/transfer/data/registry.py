"""The data sets, by the name that ``data=`` takes."""

from transfer.data import digits, folder, published, scenes
from transfer.data.spec import DatasetSpec

DATASETS: dict[str, DatasetSpec] = {
    "digits": DatasetSpec(load=digits.load),
    "folder": DatasetSpec(load=folder.load),
    "scenes": DatasetSpec(load=scenes.load),
    **dict.fromkeys(published.PUBLISHED, DatasetSpec(load=published.load)),
}
