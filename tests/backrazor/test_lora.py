"""LoRA and the razor: what is frozen keeps nothing, and the adapters' gradients are near the dense ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import backrazor as br
from tests.backrazor.compare import assert_close

pytest.importorskip("peft")
pytest.importorskip("transformers")
# peft still asks for the name that transformers gives up
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def network(**options: object) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaModel(LlamaConfig(vocab_size=50, num_key_value_heads=2, use_cache=False, **sizes))
    model = get_peft_model(model, LoraConfig(r=4, **{"target_modules": "all-linear"} | options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: nothing would reach the other half
            nn.init.normal_(parameter, std=0.1)
    return model


def gradients(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(input_ids=ids).last_hidden_state
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_adapters_before_and_after_the_razor() -> None:
    plain, ids = network(), torch.randint(0, 50, (2, 64))
    before, expected = copy.deepcopy(plain), gradients(plain, ids)
    br.razor_(before, br.RazorConfig(0.5))
    assert_close("output", before(input_ids=ids).last_hidden_state, plain(input_ids=ids).last_hidden_state, 1e-5)
    got = gradients(before, ids)
    assert got.keys() == expected.keys()
    ours, theirs = (torch.cat([g.flatten() for g in gradients.values()]) for gradients in (got, expected))
    assert F.cosine_similarity(ours, theirs, 0) > 0.95
    after = network()
    model = after.unload()
    br.razor_(model, br.RazorConfig(0.5))
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert_close("output", wrapped(input_ids=ids).last_hidden_state, model(input_ids=ids).last_hidden_state, 1e-5)


def test_what_is_frozen_keeps_nothing() -> None:
    model, ids = network(target_modules=r".*layers\.1\..*q_proj"), torch.randint(0, 50, (2, 64))
    br.razor_(model, br.RazorConfig(0.9))
    with br.memory.ledger(model) as book:
        loss = model(input_ids=ids).last_hidden_state.square().mean()
    names = {row.module for row in book.rows}
    assert not [name for name in names if ".layers.0." in name], "before the first adapter nothing needs a gradient"
    assert not [name for name in names if name.endswith("base_layer")], "a frozen weight needs no input"
    loss.backward()


def test_a_frozen_tower_is_free() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text = (nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.image(x) * self.text(x).sigmoid()

    model = Towers()
    model.image.requires_grad_(False)
    br.razor_(model, br.RazorConfig(0.9))
    with br.memory.ledger(model) as book:
        loss = model(torch.randn(64, 64)).sum()
    assert not [row for row in book.rows if row.module.startswith("image")]
    loss.backward()
