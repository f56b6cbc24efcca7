"""What a finished run shows besides curves: which layer keeps what, and images with what the network says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure

from transfer.data import DataBundle
from transfer.tables.figures import layer_bars
from transfer.tables.fonts import Lettering
from transfer.training.network import Network

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
def sample_figure(network: Network, data: DataBundle) -> Figure:
    """Return test images, evenly spaced over the split, each under the class that the network names, its probability,
    and, in red, the true class where that is another. Leaves the network in training mode.
    """
    count = min(COLUMNS * ROWS, len(data.test))
    chosen = [index * len(data.test) // count for index in range(count)]
    images, labels = zip(*(data.test[index] for index in chosen), strict=True)
    device = next(network.model.parameters()).device
    network.model.eval()
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


def _title(names: Sequence[str], guess: int, share: float, label: int) -> tuple[str, bool]:
    text = f"{names[guess][:24]} {100 * share:.0f}%"
    return (text, True) if guess == label else (f"{text}\n(is {names[label][:24]})", False)
