"""Activation checkpointing of razored networks: the recomputation saves what the forward saved, whatever was known of a
tensor outside."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import backrazor as br
from backrazor.codecs.roles import PRUNED
from tests.backrazor.compare import assert_close, assert_same_bits
from tests.backrazor.networks import freeze_norms

KNOWN = br.RazorConfig(0.9, fill="known")


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=100, **sizes))


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=100, intermediate_size=128, use_cache=False, **sizes)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 64, "n_layer": 3, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=100, use_cache=False, **sizes))


LANGUAGE = {"bert": (bert, "bert.encoder.layer"), "llama": (llama, "model.layers"), "gpt2": (gpt2, "transformer.h")}
CONFIGS = {"compact": br.RazorConfig(0.9), "known": KNOWN, "paper": br.RazorConfig.paper(0.9)}


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(3)
    out = model(x)
    out = out if isinstance(out, Tensor) else out.logits
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def wrapped(blocks: nn.Module, reentrant: bool) -> None:
    """Every block inside ``torch.utils.checkpoint``."""
    for block in blocks:
        forward = block.forward

        def call(*args: Tensor, forward: Callable = forward, **kwargs: object) -> object:
            return checkpoint(lambda *args: forward(*args, **kwargs), *args, use_reentrant=reentrant)

        block.forward = call


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True], ids=["recorded", "reentrant"])
@pytest.mark.parametrize("by", ["the network", "the caller"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models(name: str, config: str, by: str, reentrant: bool) -> None:
    torch.manual_seed(0)
    build, blocks = LANGUAGE[name]
    plain = build().train()
    br.razor_(plain, CONFIGS[config])
    ours, x = copy.deepcopy(plain), torch.randint(0, 100, (4, 32))
    if by == "the network":
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    else:
        wrapped(ours.get_submodule(blocks), reentrant)
    (expected, theirs), (got, mine) = gradients(plain, x), gradients(ours, x)
    assert_close("output", got, expected, 1e-5)
    difference = sum(float((theirs[n] - mine[n]).square().sum()) for n in theirs) ** 0.5
    size = sum(float(g.square().sum()) for g in theirs.values()) ** 0.5
    # Behind a norm, a block reads its input from the norm's codes; what enters a checkpointed one is packed instead.
    assert difference / size < (0.02 if name == "bert" and config != "paper" else 1e-6)


class Gated(nn.Module):
    """Uses its input in a product before any layer does, and as a function's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.w = nn.Linear(64, 64), nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.inner(x * x.sigmoid()) + F.linear(x, weight) + F.linear(x, self.w.t()[:64])


class Gates(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(64, 64), nn.ModuleList([Gated(), Gated()])
        self.hyper, self.reentrant = nn.Parameter(torch.randn(64, 64) / 8), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.embed(x), self.hyper * 2
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x, weight)
            else:
                x = checkpoint(block, x, weight, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True], ids=["recorded", "reentrant"])
def test_what_a_block_is_given_is_no_parameter(reentrant: bool) -> None:
    torch.manual_seed(0)
    plain, x = Gates(None), torch.randn(4, 32, 64)
    ours = Gates(reentrant)
    ours.load_state_dict(plain.state_dict())
    for model in (plain, ours):
        br.razor_(model)
    (_, theirs), (_, mine) = gradients(plain, x), gradients(ours, x)
    for name in theirs:
        assert_close(name, mine[name], theirs[name], 1e-5)


def stages() -> nn.Module:
    """Stages that begin with a convolution of what an activation at the end of the one before has made."""
    parts = [nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for c in (3, 8, 8)]
    return freeze_norms(nn.Sequential(*parts).train())


@pytest.mark.parametrize("config", [KNOWN, br.RazorConfig(0.9)], ids=["known", "compact"])
def test_activations_from_outside(config: br.RazorConfig) -> None:
    torch.manual_seed(0)
    recorded, x = stages(), torch.randn(4, 3, 16, 16)
    br.razor_(recorded, config)
    reentrant = copy.deepcopy(recorded)
    wrapped(recorded, False)
    wrapped(reentrant, True)
    x.requires_grad_()
    (_, theirs), (_, mine) = gradients(reentrant, x), gradients(recorded, x)
    for name in theirs:
        assert_same_bits(name, mine[name], theirs[name])


def test_a_pair_of_norm_and_linear_inside_reads_the_codes() -> None:
    """What is known inside counts inside, in the forward and in the recomputation."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)))
    br.razor_(plain, KNOWN)
    ours, x = copy.deepcopy(plain), torch.randn(4, 32, 64)
    wrapped(ours, False)
    (_, theirs), (_, mine) = gradients(plain, x), gradients(ours, x)
    for name in theirs:
        assert_same_bits(name, mine[name], theirs[name])


def test_notes_keep_no_hooks_alive() -> None:
    norm, x = nn.LayerNorm(64), torch.randn(4, 32, 64)
    br.razor_(norm)
    pack = lambda t: t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = norm(x)
    hook = weakref.ref(pack)
    del pack
    out.sum().backward()
    gc.collect()
    assert hook() is None
    assert out.shape == x.shape


def test_the_ledger_changes_nothing_that_is_known() -> None:
    model, x = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)), torch.randn(4, 32, 64)
    br.razor_(model)
    with br.memory.ledger(model) as book:
        out = model(x)
    assert not any(row.role == PRUNED for row in book.rows)
    assert br.memory.predict(model, (32, 64), 4).saved_bytes == book.total_bytes
    del out
