"""The library in a training loop of your own: nothing but torch, and three lines that are new.

    python examples/plain_loop.py                  about 20 seconds
    python examples/plain_loop.py --sparsity 0.97 --epochs 5

A small convolutional network learns scikit-learn's handwritten digits. Before training, two questions to ask of any
model: how far its gradients are from the dense ones, and what autograd holds with and without.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import backrazor as br


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, 32, 32) and labels, for training and for test."""
    source = load_digits()
    images = F.interpolate(torch.tensor(source.images, dtype=torch.float32)[:, None] / 8 - 1, size=32, mode="bilinear")
    labels = torch.tensor(source.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    return images[train], labels[train], images[test], labels[test]


def network() -> nn.Sequential:
    """Three convolutions with group norm and ReLU, a pooling, a classifier."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 32, 1), (32, 64, 2), (64, 128, 2)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.GroupNorm(8, outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.MaxPool2d(4), nn.Flatten(), nn.Linear(512, 10))


def saved_bytes(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """What autograd holds for backward after this batch's forward."""
    with br.memory.ledger(model) as ledger:
        loss = F.cross_entropy(model(images), labels)
    del loss  # it held the graph until the ledger was read
    return ledger.total_bytes


def main(arguments: list[str] | None = None) -> float:
    """Train, print what it cost, return the test accuracy in percent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of each activation that is pruned")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args(arguments)
    images, labels, test_images, test_labels = digits()
    model = network()
    config = br.RazorConfig(sparsity=options.sparsity)

    first = images[:64], labels[:64]
    print(br.compare_gradients(model, first[0], lambda logits: F.cross_entropy(logits, first[1]), config), "\n")
    dense = saved_bytes(model, *first)

    print(br.razor_(model, config), "\n")  # new, line 1: the same parameters, state_dict and forward

    print(
        f"saved for backward, 64 images: {dense / 1e6:.2f} MB dense, {saved_bytes(model, *first) / 1e6:.2f} MB razored"
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(options.epochs):
        model.train()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        for chosen in order.split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            br.check_finite(model)  # new, line 2: stops with the layer's name on NaN or Inf
            optimizer.step()
        model.eval()
        with torch.no_grad():
            accuracy = 100 * (model(test_images).argmax(1) == test_labels).float().mean().item()
        print(f"epoch {epoch + 1}: test accuracy {accuracy:.2f}%")

    br.unrazor_(model)  # new, line 3: a plain model again, to save or to export
    return accuracy


if __name__ == "__main__":
    main()
