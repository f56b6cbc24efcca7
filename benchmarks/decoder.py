"""A Llama-shaped decoder (8 layers, width 512, 2,048 tokens, vocabulary 32,000, batch 1): peak and time of a step.

    python benchmarks/decoder.py             # every row, three repeats; appends to results/decoder.csv
    python benchmarks/decoder.py --only peak # peaks alone, which need no idle machine

Rows: dense; checkpointing by layer; razor; razor with ``linear_cross_entropy``, which makes the logits some rows at a
time; and that loss alone. All train every weight with plain SGD, in float32, on random tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from _circumstances import append_rows, circumstances, command_line

import backrazor as br
from backrazor.memory import Step, measure_steps

RESULTS = Path(__file__).parent / "results"
TOKENS, VOCABULARY = 2048, 32000
ROWS = {
    "dense": {},
    "checkpointing by layer": {"checkpointing": True},
    "compact 0.9": {"sparsity": 0.9},
    "compact 0.9, loss in chunks": {"sparsity": 0.9, "chunked": True},
    "dense, loss in chunks": {"chunked": True},
    "checkpointing by layer, loss in chunks": {"checkpointing": True, "chunked": True},
}


def build(sparsity: float | None = None, checkpointing: bool = False, chunked: bool = False) -> Step:
    """One of the rows as a training step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=TOKENS,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    if sparsity is not None:
        br.razor_(model, br.RazorConfig(sparsity))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.randint(VOCABULARY, (1, TOKENS))

    def forward() -> torch.Tensor:
        if not chunked:
            return model(input_ids=tokens, labels=tokens).loss
        hidden = model.model(input_ids=tokens).last_hidden_state
        return br.functional.linear_cross_entropy(hidden[:, :-1], model.lm_head.weight, tokens[:, 1:])

    return Step(model, forward, torch.optim.SGD(model.parameters(), 1e-3))


def saved_bytes(make: Callable[[], Step]) -> int:
    """What autograd holds before backward."""
    step = make()
    with br.memory.ledger(step.model) as book:
        loss = step.forward()
    del loss
    return book.total_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("peak", "time"))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    what = (options.only,) if options.only else ("peak", "time")
    makes = {name: partial(build, **ROWS[name]) for name in options.rows}
    measured = measure_steps(makes, options.repeats, options.steps, what, turns="process")
    lines = []
    for name, found in measured.items():
        line = {"row": name, "saved_MB": round(saved_bytes(makes[name]) / 1e6, 1)}
        line["peak_MB"] = round(found.peak_bytes / 1e6, 1) if "peak" in what else ""
        line["seconds"] = round(found.step_seconds, 2) if "time" in what else ""
        lines.append(line)
        print(line, flush=True)
    append_rows(RESULTS / "decoder.csv", lines, circumstances(command_line()))


if __name__ == "__main__":
    main()
