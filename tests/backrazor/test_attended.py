"""The projection behind an attention reads its input from what the attention keeps of q, k and v."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn import functional as F

import backrazor as br
from backrazor.codecs import Rows
from tests.backrazor.compare import assert_close, assert_same_bits

WIDTH, HEADS, TOKENS = 64, 4, 17
CONFIG = br.RazorConfig(0.97, fill="known", values="int4")


class ViT(nn.Module):
    """Small enough that all its parts are seen, with a head so that the attention's projection is none."""

    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.attn = Attention(WIDTH, HEADS, qkv_bias=True, **settings)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attn(x).mean(1))


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    out = model(x)
    model.zero_grad()
    out.square().sum().backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters()}


def stored_output(model: ViT, x: Tensor) -> Tensor:
    """What the attention gives at its quantised q, k and v, by the formula: (B, N, C)."""
    with torch.no_grad():
        q, k, v = model.attn.qkv(x).reshape(len(x), -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
    q, k, v = (Rows(4, keeps).pack(part).unpack() for part, keeps in ((q, True), (k, False), (v, True)))
    scores = q @ k.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("fused", [True, False])
def test_the_weight_gradient_is_that_at_the_stored_attention(fused: bool) -> None:
    torch.manual_seed(0)
    plain, x = ViT(), torch.randn(3, TOKENS, WIDTH)
    plain.attn.fused_attn = fused
    ours = copy.deepcopy(plain)
    br.razor_(ours, CONFIG)
    caught: list[Tensor] = []
    ours.attn.proj.register_full_backward_hook(lambda module, grad_in, grad_out: caught.append(grad_out[0]))
    out, found = gradients(ours, x)
    if not fused:
        assert_same_bits("forward", out, plain(x))
    x_hat = stored_output(plain, x)
    wanted = torch.einsum("bno,bni->oi", caught[0], x_hat)
    assert_close("attn.proj.weight", found["attn.proj.weight"], wanted, 1e-5)
    dense = gradients(plain, x)[1]["attn.proj.weight"]
    assert F.cosine_similarity(wanted.flatten(), dense.flatten(), dim=0) > 0.98


def saved_by(model: nn.Module, x: Tensor) -> dict[str, int]:
    with br.memory.ledger(model) as book:
        loss = model(x).sum()
    del loss
    return book.by_module()


def test_the_projection_itself_keeps_nothing() -> None:
    model = ViT()
    x = torch.randn(3, TOKENS, WIDTH)
    br.razor_(model, CONFIG)
    assert "attn.proj" not in saved_by(model, x)
    predicted = br.memory.predict(model, (TOKENS, WIDTH), 3, loss_fn=torch.sum).saved_bytes
    assert sum(saved_by(model, x).values()) == predicted
    br.razor_(model, br.RazorConfig(0.97, fill="zero"))  # the paper's rule prunes every input
    assert saved_by(model, x)["attn.proj"] > 0


def changed_in_place(model: ViT, x: Tensor) -> Tensor:
    def double(module: nn.Module, inputs: tuple[Tensor]) -> None:
        inputs[0].mul_(2)

    model.attn.proj.register_forward_pre_hook(double)
    return model(x)


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [({"attn_drop": 0.5}, TOKENS), ({}, WIDTH), ({"norm_layer": nn.LayerNorm, "scale_norm": True}, TOKENS)],
    ids=["dropout", "as many tokens as features", "a norm between"],
)
def test_what_has_no_stored_form_is_packed_by_itself(settings: dict, tokens: int) -> None:
    model, x = ViT(**settings).train(), torch.randn(3, tokens, WIDTH)
    br.razor_(model, CONFIG)
    names = saved_by(model, x)
    assert any(name in names for name in ("attn.proj", "attn.norm"))


def test_an_output_that_changed_since_is_packed_as_it_is() -> None:
    torch.manual_seed(0)
    plain, x = ViT(), torch.randn(3, TOKENS, WIDTH)
    plain.attn.fused_attn = False  # whose output PyTorch's backward does not read
    ours = copy.deepcopy(plain)
    br.razor_(ours, br.RazorConfig(0.1, fill="known", values="float32"))
    found = []
    for model in (plain, ours):
        changed_in_place(model, x).square().sum().backward()
        found.append(model.attn.proj.weight.grad)
    assert F.cosine_similarity(found[0].flatten(), found[1].flatten(), dim=0) > 0.999
    assert 0.99 < found[1].norm() / found[0].norm() < 1.01


def test_checkpointing_recomputes_the_same() -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = ViT(), torch.randn(3, TOKENS, WIDTH)
    br.razor_(model, CONFIG)
    _, wanted = gradients(model, x)
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, wanted[name]), name
