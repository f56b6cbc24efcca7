"""What was released and published for each data set: settings of commands, accuracies, and where each comes from.

Settings are those of the commands released with Back Razor (VITA-Group/BackRazor_Neurips22) and with TinyTL
(mit-han-lab/tinyml); published figures are from table 2 of TinyTL (Cai et al., NeurIPS 2020, arXiv 2007.11622). The
paper's own result tables could not be checked, so no figure of them is here. What nobody released says ``ours``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

DATA = ("flowers", "cars", "cub200", "food101", "pets", "aircraft", "cifar10", "cifar100")


@dataclass(frozen=True)
class Published:
    """A published row: memory by its authors' formula in MB (1e6 bytes) at batch 8, accuracy in percent by data set."""

    memory_mb: float
    accuracy: Mapping[str, float]


def _tinytl(memory_mb: float, *accuracy: float) -> Published:
    return Published(memory_mb, dict(zip(DATA, accuracy, strict=True)))


TINYTL = {
    "FT-Last": _tinytl(31, 90.1, 50.9, 73.3, 68.7, 91.3, 44.9, 85.9, 68.8),
    "TinyTL-B": _tinytl(32, 93.5, 73.4, 75.3, 75.5, 92.1, 63.2, 93.7, 78.8),
    "TinyTL-L": _tinytl(37, 95.3, 84.2, 76.8, 79.2, 91.7, 76.4, 96.1, 80.9),
    "TinyTL-L+B": _tinytl(37, 95.5, 85.0, 77.1, 79.7, 91.8, 75.4, 95.9, 81.4),
    "FT-Norm+Last": _tinytl(192, 94.3, 77.9, 76.3, 77.0, 92.2, 68.1, 94.8, 80.2),
    "FT-Full": _tinytl(391, 96.8, 90.2, 81.0, 84.6, 93.0, 86.0, 97.1, 84.1),
}


RELEASED = "the released command"
NOT_RELEASED = "not released: the settings of the row that prunes"


@dataclass(frozen=True)
class Dense:
    """What a dense row sets otherwise than the row that prunes."""

    lr: float
    bn_affine: str = "train"
    bn_stats: str = "batch"
    origin: str = RELEASED


@dataclass(frozen=True)
class CnnRecipe:
    """What table 1 sets for one data set; the batch norm columns are those of the row that prunes.

    Args:
        lr: peak learning rate of Adam.
        jitter: whether training images get colour jitter.
        bn_affine, bn_stats: as the keys of ``method``.
        origin: where the settings of the row that prunes come from.
        dense: the dense command, None where none was released.
    """

    lr: float
    label_smoothing: float
    jitter: bool
    bn_affine: str
    bn_stats: str
    origin: str = RELEASED
    dense: Dense | None = None


PROXYLESSNAS = {
    "cifar10": CnnRecipe(3e-5, 0.1, False, "frozen", "frozen"),
    "cifar100": CnnRecipe(3e-5, 0.1, False, "frozen", "frozen"),
    "pets": CnnRecipe(3e-5, 0.3, False, "frozen", "frozen"),
    "food101": CnnRecipe(3e-5, 0.1, False, "frozen", "batch"),
    "cub200": CnnRecipe(1e-4, 0.7, False, "frozen", "batch"),
    "aircraft": CnnRecipe(3e-4, 0.3, True, "frozen", "batch"),
    "cars": CnnRecipe(3e-4, 0.7, True, "train", "batch"),
    "flowers": CnnRecipe(
        *(1e-4, 0.7, False, "train", "batch"),
        origin="extrapolated: the released command of this data set is the dense row's, here with 0.9 pruned",
        dense=Dense(1e-4),
    ),
}
RESNET18 = {
    "cifar10": CnnRecipe(1e-5, 0.1, False, "frozen", "frozen", dense=Dense(3e-5)),
    "cifar100": CnnRecipe(
        *(1e-5, 0.1, False, "frozen", "frozen"),
        origin="the released command, which tries 1e-5, 3e-6 and 1e-6: the first",
        dense=Dense(
            *(3e-5, "frozen", "frozen"), origin="the released command, which tries 3e-5, 1e-5, 3e-6 and 1e-6: the first"
        ),
    ),
}


def _ours(origin: str, rate: float = 1.0) -> dict[str, CnnRecipe]:
    return {
        name: replace(recipe, lr=float(f"{recipe.lr * rate:.2g}"), origin=f"ours: {origin}", dense=None)
        for name, recipe in PROXYLESSNAS.items()
    }


CNN = {
    "proxylessnas": PROXYLESSNAS,
    "resnet18": RESNET18,
    "mobilenetv2": _ours("no command was released; ProxylessNAS's settings"),
    "resnet50": _ours(
        "no command was released; ProxylessNAS's settings at a third of its rates, as ResNet-18's is on CIFAR-10",
        rate=1 / 3,
    ),
}
DIGITS_CNN = CnnRecipe(3e-4, 0.1, False, "frozen", "frozen", origin="ours: a smoke run")
CNN_SPARSITY = 0.9

# Learning rate and label smoothing of TinyTL's released L+B commands, batch 8.
TINYTL_COMMANDS = {
    "cifar10": (3e-4, 0.1),
    "cifar100": (3e-4, 0.1),
    "aircraft": (1.6e-3, 0.7),
    "cars": (8e-4, 0.7),
    "cub200": (6e-4, 0.7),
    "flowers": (2e-4, 0.7),
    "food101": (2e-4, 0.1),
    "pets": (5e-5, 0.7),
}


@dataclass(frozen=True)
class VitRecipe:
    """What table 2 sets for one data set."""

    sparsity: float
    lr: float
    steps: int
    co_tuning: bool = False
    head_lr_multiplier: float = 1.0


VIT = {
    "cifar10": VitRecipe(0.9, 0.01, 20000),
    "cifar100": VitRecipe(0.9, 0.01, 20000),
    "cub200": VitRecipe(0.9, 0.01, 6000),
    "pets": VitRecipe(0.9, 0.001, 20000, co_tuning=True),
    "aircraft": VitRecipe(0.8, 0.03, 6000, co_tuning=True, head_lr_multiplier=10.0),
    "flowers": VitRecipe(0.8, 0.03, 2000),
    "food101": VitRecipe(0.8, 0.01, 30000),
    "cars": VitRecipe(0.8, 0.1, 16000),
}
DIGITS_VIT = VitRecipe(0.9, 0.01, 20)
