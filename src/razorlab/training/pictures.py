"""What a finished run shows besides curves: which layer keeps what, and images with what the network says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from razorlab.data import DataBundle
from razorlab.tables.figures import layer_bars
from razorlab.tables.fonts import Lettering
from razorlab.training.network import Network

COLUMNS, ROWS = 6, 3


def layer_figure(memory: Mapping[str, object]) -> Figure | None:
    """Return the memory of a record by layer; None where it was not measured."""
    layers = memory.get("saved_by_layer")
    if not layers:
        return None
    figure = Figure(figsize=(8, 6), layout="constrained")
    layer_bars({"this run": layers}, figure.subplots())
    return figure


@torch.no_grad()
def sample_figure(network: Network, data: DataBundle) -> Figure | None:
    """Return test images, evenly spaced over the split, each under the class that the network names, its probability,
    and, in red, the true class where that is another. Where every pixel has a class, the image, its mask and the
    network's. Leaves the network in training mode. None for texts.
    """
    if network.backbone.vocabulary is not None:
        return None
    count = min(COLUMNS * ROWS if network.pixel_classes is None else COLUMNS, len(data.test))
    chosen = [index * len(data.test) // count for index in range(count)]
    images, labels = zip(*(data.test[index] for index in chosen), strict=True)
    device = next(network.model.parameters()).device
    network.model.eval()
    if network.pixel_classes is not None:
        guesses = network.model(network.normalise(torch.stack(images).to(device))).argmax(1).cpu()
        network.train()
        return _maps(images, labels, guesses, network.pixel_classes)
    shares = network.model(network.normalise(torch.stack(images).to(device))).float().softmax(1).max(1)
    network.train()
    figure = Figure(figsize=(2 * COLUMNS, 2.4 * ROWS), layout="constrained")
    panels = list(figure.subplots(ROWS, COLUMNS, squeeze=False).flat)
    for panel in panels:
        panel.axis("off")
    lettering = Lettering(data.class_names)
    names = [lettering.drawable(name) for name in data.class_names]
    told = zip(panels, images, labels, shares.indices.tolist(), shares.values.tolist(), strict=False)
    for panel, image, label, guess, share in told:
        panel.imshow(image.permute(1, 2, 0).numpy())
        text, right = _title(names, guess, share, int(label))
        color = "black" if right else "red"
        panel.set_title(text, fontsize="small", color=color, parse_math=False, fontfamily=lettering.families)
    return figure


def _maps(images: Sequence[Tensor], masks: Sequence[Tensor], guesses: Tensor, classes: int) -> Figure:
    """Images (3, S, S) above their masks (S, S) and the guessed ones; what is not labelled is white."""
    figure = Figure(figsize=(2 * COLUMNS, 2 * ROWS), layout="constrained")
    panels = figure.subplots(ROWS, COLUMNS, squeeze=False)
    for panel in panels.flat:
        panel.axis("off")
    for column, image, mask, guess in zip(panels.T, images, masks, guesses, strict=False):
        column[0].imshow(image.permute(1, 2, 0).numpy())
        for panel, classes_of in zip(column[1:], (mask, guess), strict=True):
            shown = np.ma.masked_less(classes_of.numpy(), 0)
            panel.imshow(shown, cmap="nipy_spectral", vmin=0, vmax=classes - 1, interpolation="nearest")
    return figure


def _title(names: Sequence[str], guess: int, share: float, label: int) -> tuple[str, bool]:
    text = f"{names[guess][:24]} {100 * share:.0f}%"
    return (text, True) if guess == label else (f"{text}\n(is {names[label][:24]})", False)
