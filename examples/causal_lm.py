"""A small Llama learns Python's own manual, dense and razored side by side.

    pip install transformers
    python examples/causal_lm.py                  # half a minute on one core
    python examples/causal_lm.py --sparsity 0.95 --steps 200

The text is the language reference as `help()` shows it: the module pydoc_data.topics of Python itself (Python Software
Foundation licence, version 2). Both models start from the same random weights and see the same pieces in the same
order; the last tenth of the text is for testing. The razored one takes `linear_cross_entropy` for its loss, which never
holds the logits of a batch.
"""

from __future__ import annotations

import argparse
import time
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import backrazor as br

VOCABULARY, TOKENS, BATCH = 2048, 96, 8


def pieces() -> tuple[Tensor, Tensor]:
    """Training and test pieces of the text, (N, TOKENS) int64 each, in byte pairs that are learnt from it."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False))
    ids = torch.tensor(tokenizer.encode(text).ids)
    rows = ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)
    return rows[: len(rows) * 9 // 10], rows[len(rows) * 9 // 10 :]


def build() -> LlamaForCausalLM:
    """Two million parameters, always the same."""
    torch.manual_seed(0)
    shape = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=TOKENS, **shape))


def loss_of(model: LlamaForCausalLM, tokens: Tensor, razored: bool) -> Tensor:
    """Mean loss of the next token, nats."""
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
    if razored:
        return br.functional.linear_cross_entropy(hidden, model.lm_head.weight, tokens[:, 1:])
    return F.cross_entropy(model.lm_head(hidden).flatten(0, 1), tokens[:, 1:].flatten())


def train(steps: int, sparsity: float | None) -> tuple[list[float], float, int, float]:
    """The loss of each step, the loss on the test pieces, bytes saved for backward, and seconds per step."""
    train_rows, test_rows = pieces()
    model = build().train()
    if sparsity is not None:
        br.razor_(model, br.RazorConfig(sparsity))
    razored = sparsity is not None
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    order = torch.randint(len(train_rows), (steps, BATCH), generator=torch.Generator().manual_seed(1))
    with br.memory.ledger(model) as book:
        loss = loss_of(model, train_rows[order[0]], razored)
    losses = []
    start = time.perf_counter()
    for chosen in order:
        loss = loss_of(model, train_rows[chosen], razored)
        loss.backward()
        br.check_finite(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = (time.perf_counter() - start) / steps
    model.eval()
    with torch.no_grad():
        test = torch.stack([loss_of(model, rows, razored) for rows in test_rows.split(64)]).mean().item()
    return losses, test, book.total_bytes, seconds


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Print both loss curves side by side; return the loss on the test pieces of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sparsity", type=float, default=0.9)
    options = parser.parse_args(arguments)
    rows = {"dense": train(options.steps, None), "razored": train(options.steps, options.sparsity)}
    print(f"{'step':>10}" + "".join(f"{name:>12}" for name in rows))
    every = max(options.steps // 6, 1)
    for last in range(every, options.steps + 1, every):
        means = (sum(losses[last - every : last]) / every for losses, *_ in rows.values())
        print(f"{last:>10}" + "".join(f"{mean:>12.3f}" for mean in means))
    for label, column, scale in (("test loss", 1, 1), ("saved, MB", 2, 1e6), ("s per step", 3, 1)):
        print(f"{label:>10}" + "".join(f"{row[column] / scale:>12.3f}" for row in rows.values()))
    return {name: row[1] for name, row in rows.items()}


if __name__ == "__main__":
    main()
