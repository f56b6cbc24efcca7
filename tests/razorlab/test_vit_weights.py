"""The Vision Transformer's released weights file: read tensor by tensor without pickle, the head left new."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models import VisionTransformer
from torch import Tensor

from razorlab.errors import UserError
from razorlab.models.weights import load_weights

WIDTH, HEADS, DEPTH = 24, 3, 2


def network(classes: int, seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=classes
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def released(model: VisionTransformer) -> dict[str, np.ndarray]:
    """The network's tensors under the names and in the layout of the released file, a kernel as (in, out)."""
    names = {"embedding/bias": model.patch_embed.proj.bias, "cls": model.cls_token}
    names["embedding/kernel"] = model.patch_embed.proj.weight.permute(2, 3, 1, 0)
    names["Transformer/posembed_input/pos_embedding"] = model.pos_embed
    names |= {"head/kernel": model.head.weight.T, "head/bias": model.head.bias}
    names |= norm("Transformer/encoder_norm", model.norm)
    for i, block in enumerate(model.blocks):
        root = f"Transformer/encoderblock_{i}"
        names |= norm(f"{root}/LayerNorm_0", block.norm1) | norm(f"{root}/LayerNorm_2", block.norm2)
        attention = f"{root}/MultiHeadDotProductAttention_1"
        parts = zip(block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True)
        for name, (weight, bias) in zip(("query", "key", "value"), parts, strict=True):
            names[f"{attention}/{name}/kernel"] = weight.T.reshape(WIDTH, HEADS, -1)
            names[f"{attention}/{name}/bias"] = bias.reshape(HEADS, -1)
        names[f"{attention}/out/kernel"] = block.attn.proj.weight.T.reshape(HEADS, -1, WIDTH)
        names[f"{attention}/out/bias"] = block.attn.proj.bias
        for place, linear in enumerate((block.mlp.fc1, block.mlp.fc2)):
            names[f"{root}/MlpBlock_3/Dense_{place}/kernel"] = linear.weight.T
            names[f"{root}/MlpBlock_3/Dense_{place}/bias"] = linear.bias
    return {name: tensor.detach().contiguous().numpy() for name, tensor in names.items()}


def norm(name: str, layer: torch.nn.LayerNorm) -> dict[str, Tensor]:
    return {f"{name}/scale": layer.weight, f"{name}/bias": layer.bias}


def test_every_tensor_but_the_head_comes_from_the_file(tmp_path: Path) -> None:
    source, model = network(classes=7, seed=0), network(classes=3, seed=1)
    head = model.head.weight.detach().clone()
    np.savez(tmp_path / "ViT-B_16.npz", **released(source))
    load_weights(model, tmp_path / "ViT-B_16.npz", "head")
    for (name, ours), theirs in zip(model.named_parameters(), source.parameters(), strict=True):
        if not name.startswith("head."):
            assert torch.equal(ours, theirs), name
    assert torch.equal(model.head.weight, head)


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    tensors = released(network(classes=7, seed=0))
    del tensors["Transformer/encoderblock_1/LayerNorm_0/scale"]
    np.savez(tmp_path / "other.npz", **tensors)
    with pytest.raises(UserError, match=r"other\.npz cannot be read as vision transformer weights"):
        load_weights(network(classes=3, seed=1), tmp_path / "other.npz", "head")
