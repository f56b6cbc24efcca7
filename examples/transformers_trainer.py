"""The library under a ``transformers`` Trainer: one line before ``trainer.train()``.

    python examples/transformers_trainer.py        about a minute

A small Vision Transformer from a configuration with random weights (nothing is downloaded) learns scikit-learn's
handwritten digits. For a pretrained one, put ``from_pretrained(...)`` in the place of the constructor.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import backrazor as br


class Digits(Dataset):
    """Items as a Trainer wants them: a dict with the names of the model's arguments."""

    def __init__(self, train: bool) -> None:
        source = load_digits()
        pixels = torch.tensor(source.images, dtype=torch.float32)[:, None] / 8 - 1
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
        chosen = order[:1200] if train else order[1200:]
        self.pixels, self.labels = pixels[chosen], torch.tensor(source.target)[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def network() -> ViTForImageClassification:
    """A Vision Transformer of 16 tokens and 0.8 M parameters."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def saved_bytes(model: ViTForImageClassification, data: Digits, images: int) -> int:
    """What autograd holds for backward after the forward of the first ``images``."""
    with br.memory.ledger(model) as ledger:
        loss = model(pixel_values=data.pixels[:images], labels=data.labels[:images]).loss
    del loss  # it held the graph until the ledger was read
    return ledger.total_bytes


def main(arguments: list[str] | None = None) -> float:
    """Train, print what it cost, return the test accuracy in percent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of each activation that is pruned")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args(arguments)
    train, test, model = Digits(train=True), Digits(train=False), network()
    dense = saved_bytes(model, train, 64)

    print(br.razor_(model, br.RazorConfig(sparsity=options.sparsity)))  # the one new line

    razored = saved_bytes(model, train, 64)
    print(f"saved for backward, 64 images: {dense / 1e6:.2f} MB dense, {razored / 1e6:.2f} MB razored")
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=256,
            learning_rate=1e-3,
            logging_steps=50,
            save_strategy="no",
            report_to=[],
            seed=0,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        trainer = Trainer(model, settings, train_dataset=train, eval_dataset=test)
        trainer.train()
        logits = trainer.predict(test).predictions
    accuracy = 100 * float((torch.from_numpy(logits).argmax(1) == test.labels).float().mean())
    print(f"test accuracy {accuracy:.2f}%")
    br.unrazor_(model)
    return accuracy


if __name__ == "__main__":
    main()
