"""Attention layers of torch, timm and transformers: the dense forward bit for bit, dense training in the limit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import backrazor as br
from backrazor.nn.attention import RazorMultiheadAttention, SdpaDropIn

from .compare import LIMITS, assert_close, assert_same_bits

DENSE_LIMIT = br.RazorConfig(0.0, values="float32", norm="dense", activation="dense", attention="pruned", rest="dense")
CONFIGS = {"compact": br.RazorConfig(0.9), "paper": br.RazorConfig.paper(0.9), "int8": br.RazorConfig.int8()}


def razored(model: nn.Module, config: br.RazorConfig) -> nn.Module:
    twin = copy.deepcopy(model)
    br.razor_(twin, config)
    return twin


def run(model: nn.Module, forward: Callable[[nn.Module], Tensor], seed: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the gradients of a fixed projection of it."""
    torch.manual_seed(seed)
    out = forward(model)
    torch.manual_seed(seed)
    out.backward(torch.randn(out.shape))
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training(plain: nn.Module, forward: Callable[[nn.Module], Tensor], limit: float = 1e-5) -> None:
    """In the dense limit every gradient is the dense one."""
    _, expected = run(copy.deepcopy(plain), forward)
    _, got = run(razored(plain, DENSE_LIMIT), forward)
    assert list(got) == list(expected)
    for name, gradient in expected.items():
        if float(gradient.norm()) > 1e-4 * max(float(g.norm()) for g in expected.values()):
            assert_close(name, got[name], gradient, limit)


def timm_attention(**settings: object) -> nn.Module:
    from timm.layers.attention import Attention

    return Attention(48, num_heads=4, qkv_bias=True, norm_layer=nn.LayerNorm, **settings)


TIMM = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "dropout": {"attn_drop": 0.3, "proj_drop": 0.2},
    "scale_norm": {"scale_norm": True},
    "gated": {"gated": True},
    "wide heads": {"attn_head_dim": 20},
}
MASKS: dict[str, dict] = {
    "none": {},
    "bool": {"attn_mask": torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(1)) < 0.8},
    "added": {"attn_mask": torch.randn(4, 9, 9, generator=torch.Generator().manual_seed(1))},
    "causal": {"is_causal": True},
}
MASKS["bool"]["attn_mask"][..., 0] = True


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("settings", TIMM)
def test_timm_attention(settings: str, mask: str) -> None:
    pytest.importorskip("timm")
    plain, x = timm_attention(**TIMM[settings]), torch.randn(2, 9, 48, requires_grad=True)
    forward = lambda model: model(x, **MASKS[mask])  # noqa: E731
    fused, unfused = copy.deepcopy(plain), copy.deepcopy(plain)
    fused.fused_attn, unfused.fused_attn = True, False
    out, kernel = (run(model, forward)[0] for model in (unfused, fused))
    for name, config in CONFIGS.items():
        for model in (fused, unfused):
            ours = razored(model, config)
            assert isinstance(ours, SdpaDropIn)
            # the paper's rule keeps the scores, and dropout draws its own numbers: both need the formula
            as_it_was = model is fused and config.attention != "pruned" and "drop" not in settings
            assert_same_bits(f"output, {name}", run(ours, forward)[0], kernel if as_it_was else out)
    if "drop" not in settings:
        assert_close("output beside SDPA", out, kernel, 1e-5)
    assert_same_training(unfused, forward)


def test_the_switch_of_a_timm_layer_comes_back() -> None:
    pytest.importorskip("timm")
    plain = timm_attention()
    plain.fused_attn = False
    ours = razored(nn.Sequential(plain), br.RazorConfig(0.9))
    assert ours[0].fused_attn is True
    copied = pickle.loads(pickle.dumps(ours))
    assert type(copied[0]) is type(ours[0])
    br.unrazor_(copied)
    assert type(copied[0]) is type(plain)
    assert copied[0].fused_attn is False


def test_grouped_queries() -> None:
    layers = pytest.importorskip("timm.layers.attention")
    plain = layers.AttentionRope(48, num_heads=4, num_kv_heads=2, qkv_fused=False)
    ours, x = (
        razored(plain, br.RazorConfig(0.0, values="float32", attention="int8", rest="dense")),
        torch.randn(2, 9, 48),
    )
    assert_close("output", ours(x), plain(x), 1e-5)
    for model in (plain, ours):
        model(x).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
        if not name.startswith("k_proj.bias"):  # which softmax ignores
            assert F.cosine_similarity(q.grad.flatten(), p.grad.flatten(), 0) > 0.999, name


MHA_FORMS = {
    "none": {},
    "padding": {"key_padding_mask": torch.tensor([[False] * 7, [False] * 5 + [True] * 2])},
    "added padding": {"key_padding_mask": torch.tensor([[0.0] * 7, [0.0] * 5 + [-1e4] * 2])},
    "bool": {"attn_mask": torch.ones(5, 7, dtype=torch.bool).triu(3)},
    "added": {"attn_mask": torch.linspace(-1, 1, 35).view(5, 7)},
    "a mask per head": {"attn_mask": torch.linspace(-1, 1, 8 * 35).view(8, 5, 7)},
    "both": {
        "key_padding_mask": torch.tensor([[False] * 7, [False] * 5 + [True] * 2]),
        "attn_mask": torch.ones(5, 7, dtype=torch.bool).triu(3),
    },
}
MHA_KINDS = {"one width": {}, "other widths": {"kdim": 24, "vdim": 20}, "no bias": {"bias": False}}


def mha(model: nn.Module, inputs: tuple[Tensor, ...], need_weights: bool, **form: object) -> Tensor:
    """The output with the batch first."""
    if not model.batch_first:
        turned = {id(x): x.transpose(0, 1) for x in inputs}  # one object stays one object
        inputs = tuple(turned[id(x)] for x in inputs)
    out, weights = model(*inputs, need_weights=need_weights, **form)
    assert (weights is not None) == need_weights
    return out if model.batch_first else out.transpose(0, 1)


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "batch second"])
@pytest.mark.parametrize("form", MHA_FORMS)
@pytest.mark.parametrize("kind", MHA_KINDS)
def test_multihead_attention(kind: str, form: str, batch_first: bool) -> None:
    plain = nn.MultiheadAttention(32, 4, batch_first=batch_first, **MHA_KINDS[kind])
    inputs = tuple(
        torch.randn(2, length, width, requires_grad=True)
        for length, width in ((5, 32), (7, plain.kdim), (7, plain.vdim))
    )
    forward = partial(mha, inputs=inputs, need_weights=False, **MHA_FORMS[form])
    sdpa = run(copy.deepcopy(plain), forward)[0]
    with_weights = run(copy.deepcopy(plain), partial(mha, inputs=inputs, need_weights=True, **MHA_FORMS[form]))[0]
    for name, config in CONFIGS.items():
        out = run(razored(plain, config), forward)[0]
        assert_close(f"output beside SDPA, {name}", out, sdpa, 1e-5)
        assert_close(f"output beside the form that gives weights, {name}", out, with_weights, 1e-6)
        assert_same_bits(f"output beside the formula, {name}", out, unfused_mha(plain, inputs, **MHA_FORMS[form]))
    assert_same_training(plain, forward)


def unfused_mha(
    layer: nn.MultiheadAttention,
    inputs: tuple[Tensor, ...],
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """The textbook formula, the batch first."""
    if layer.in_proj_weight is not None:
        weights = layer.in_proj_weight.chunk(3)
    else:
        weights = layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight
    biases = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    projected = (F.linear(*item) for item in zip(inputs, weights, biases, strict=True))
    q, k, v = (x.unflatten(2, (layer.num_heads, -1)).transpose(1, 2) for x in projected)
    added = 0.0
    if attn_mask is not None:
        heads = layer.num_heads if attn_mask.dim() == 3 else 1
        added = minus_infinity(attn_mask).reshape(-1, heads, *attn_mask.shape[-2:])
    if key_padding_mask is not None:
        added = added + minus_infinity(key_padding_mask)[:, None, None]
    p = (q * layer.head_dim**-0.5 @ k.transpose(2, 3) + added).softmax(-1)
    return layer.out_proj((p @ v).transpose(1, 2).flatten(2)).detach()


def minus_infinity(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "batch second"])
def test_multihead_self_attention_packs_its_input_once(batch_first: bool) -> None:
    plain = nn.MultiheadAttention(32, 4, batch_first=batch_first, dropout=0.2)
    x = torch.randn(3, 6, 32, requires_grad=True)
    ours = razored(plain, br.RazorConfig(0.9, values="float32", fill="zero", index="bitmap"))
    with br.memory.ledger(ours) as book:
        out = mha(ours, (x,) * 3, need_weights=False)
    packed = {(row.module, row.role): row.bytes for row in book.rows}
    kept = 192 - 172 + 1
    assert packed["", "pruned values"] == 2 * 3 * kept * 4  # the input, and that of the output projection
    del out
    assert_same_training(plain.eval(), partial(mha, inputs=(x,) * 3, need_weights=False))


def test_asking_for_weights_is_dense_and_said_so() -> None:
    plain = nn.MultiheadAttention(32, 4, batch_first=True)
    ours, x = copy.deepcopy(plain), torch.randn(2, 6, 32, requires_grad=True)
    (row,) = [row for row in br.razor_(ours, br.RazorConfig(0.9)).replaced if row.original == "MultiheadAttention"]
    assert "dense where need_weights=True" in row.keeps
    (got, ours_weights), (expected, weights) = ours(x, x, x), plain(x, x, x)
    assert_same_bits("output", got, expected)
    assert_same_bits("weights", ours_weights, weights)
    for model in (plain, ours):
        model(x[0], x[0], x[0])[0].square().sum().backward()  # unbatched: dense as well
    assert_close("unbatched", ours.in_proj_weight.grad, plain.in_proj_weight.grad, 1e-6)


@pytest.mark.parametrize("settings", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_forms_without_a_pruned_one_are_left(settings: dict) -> None:
    model = nn.Sequential(nn.MultiheadAttention(16, 2, **settings))
    report = br.razor_(model, br.RazorConfig(0.9))
    assert not isinstance(model[0], br.nn.DropIn)
    assert "add_bias_kv" in next(row.reason for row in report.left if row.name == "0")


ENCODERS = {
    "relu": {},
    "gelu": {"activation": "gelu"},
    "gelu, norm first, batch second": {"activation": "gelu", "norm_first": True, "batch_first": False},
    "a module": {"activation": nn.GELU()},
    "another function": {"activation": F.silu, "norm_first": True},
}


@pytest.mark.parametrize("settings", ENCODERS)
def test_transformer_encoder_layer(settings: str) -> None:
    plain = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, **{"batch_first": True} | ENCODERS[settings])
    x = torch.randn(3, 6, 32, requires_grad=True)
    padding = torch.zeros(3, 6, dtype=torch.bool).index_fill(1, torch.tensor([5]), True)
    masks = {"src_key_padding_mask": padding, "src_mask": torch.ones(6, 6, dtype=torch.bool).triu(2)}

    def forward(model: nn.Module) -> Tensor:
        given = x if ENCODERS[settings].get("batch_first", True) else x.transpose(0, 1)
        return model(given, **masks)

    for name, config in CONFIGS.items():
        ours = razored(plain, config)
        assert isinstance(ours.self_attn, RazorMultiheadAttention)
        assert_close(f"output, {name}", run(ours, forward)[0], run(copy.deepcopy(plain), forward)[0], 1e-5)
        with torch.no_grad():
            assert_same_bits(f"in evaluation, {name}", forward(ours.eval()), forward(copy.deepcopy(plain).eval()))
    assert_same_training(plain, forward)


def test_an_encoder_keeps_less_than_dense() -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(64, 4, 256, dropout=0.1, activation="gelu", batch_first=True), 2
    )
    sizes = []
    for model in (encoder, razored(encoder, br.RazorConfig(0.9))):
        with br.memory.ledger(model) as book:
            out = model(torch.randn(4, 32, 64))
        del out
        sizes.append(book.total_bytes)
    assert sizes[0] > 7 * sizes[1]
    br.razor_(encoder, br.RazorConfig(0.9))
    assert br.memory.predict(encoder, (32, 64), 4).saved_bytes == sizes[1]


@pytest.mark.parametrize("config", CONFIGS)
def test_checkpointing_gives_the_same_gradients(config: str) -> None:
    plain = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.2, activation="gelu", batch_first=True)
    ours, x = razored(plain, CONFIGS[config]), torch.randn(3, 6, 32, requires_grad=True)
    _, direct = run(copy.deepcopy(ours), lambda model: model(x))
    _, recomputed = run(ours, lambda model: checkpoint(model, x, use_reentrant=False))
    for name, gradient in direct.items():
        assert_same_bits(name, recomputed[name], gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    plain = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, activation="gelu", batch_first=True)
    x = torch.randn(3, 6, 32, requires_grad=True)

    def forward(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype):
            return model(x).float()

    out, dense = run(copy.deepcopy(plain), forward)
    exact, gradients = run(razored(plain, DENSE_LIMIT), forward)
    assert_close("output", exact, out, LIMITS[dtype])
    for name, gradient in dense.items():
        if not name.endswith("bias"):  # a sum of many small terms that cancel
            assert gradients[name].dtype == gradient.dtype
            assert F.cosine_similarity(gradients[name].flatten(), gradient.flatten(), dim=0) > 0.999, name


def bert(implementation: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=16,
        attn_implementation=implementation,
    )
    tokens = torch.randint(40, (3, 11))
    padding = torch.ones(3, 11, dtype=torch.long)
    padding[1, 7:] = 0
    model = transformers.BertModel(config, add_pooling_layer=False).train()
    return model, lambda model: model(tokens, attention_mask=padding).last_hidden_state


def hf_vit(implementation: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        attn_implementation=implementation,
    )
    images = torch.randn(2, 3, 32, 32)
    model = transformers.ViTModel(config, add_pooling_layer=False).train()
    return model, lambda model: model(images).last_hidden_state


@pytest.mark.parametrize("build", [bert, hf_vit])
def test_transformers(build: Callable) -> None:
    eager, forward = build("eager")
    sdpa, _ = build("sdpa")
    sdpa.load_state_dict(eager.state_dict())
    out = run(copy.deepcopy(eager), forward)[0]
    for name, config in CONFIGS.items():
        ours = copy.deepcopy(eager)
        report = br.razor_(ours, config)
        assert {"Linear", "LayerNorm", "GELUActivation"} <= {row.original for row in report.replaced}
        assert sum("Attention" in row.original for row in report.replaced) == 2
        ends = "the paper leaves both ends of a transformer dense"
        assert {row.reason for row in report.left} <= {"keeps its indices", ends}
        assert_same_bits(f"eager, {name}", run(ours, forward)[0], out)
    model = copy.deepcopy(sdpa).eval()
    assert_same_bits("SDPA", run(razored(model, br.RazorConfig(0.9)), forward)[0], run(model, forward)[0])
    assert_same_training(eager, forward)
    sizes = []
    for model in (eager, razored(eager, br.RazorConfig(0.9)), razored(sdpa, br.RazorConfig(0.9))):
        with br.memory.ledger(model) as book:
            kept = forward(model)
        del kept
        sizes.append(book.total_bytes)
    assert min(sizes[0] / sizes[1], sizes[0] / sizes[2]) > 5


def test_attention_weights_of_transformers_are_the_dense_ones() -> None:
    model, _ = bert("eager")
    tokens = torch.randint(40, (2, 9))
    model.eval()
    expected = model(tokens, output_attentions=True).attentions
    got = razored(model, br.RazorConfig(0.9))(tokens, output_attentions=True).attentions
    for layer, (ours, dense) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(f"weights of layer {layer}", ours, dense)


def test_an_attention_implementation_without_a_drop_in_is_named() -> None:
    model, _ = bert("eager")
    model.config._attn_implementation = "flex_attention"
    reasons = {row.reason for row in br.razor_(model, br.RazorConfig(0.9)).left}
    assert any("flex_attention" in reason and "'sdpa'" in reason for reason in reasons)


def small_vit() -> nn.Module:
    from timm.models import VisionTransformer

    return VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=5, init_values=1.0, qk_norm=True
    )


def test_hundred_steps_beside_dense() -> None:
    pytest.importorskip("timm")
    plain = small_vit()
    for block in plain.blocks:
        block.attn.fused_attn = False
    ours = razored(plain, DENSE_LIMIT)
    assert sum(isinstance(module, SdpaDropIn) for module in ours.modules()) == 1
    optimizers = [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) for model in (plain, ours)]
    generator, losses = torch.Generator().manual_seed(5), []
    x = torch.randn(20, 3, 16, 16, generator=generator)
    x += 2 * torch.randn(5, 3, 16, 16, generator=generator).repeat(4, 1, 1, 1)  # a pattern per class
    for _ in range(100):
        pick = torch.randperm(20, generator=generator)[:8]
        pair = []
        for model, optimizer in zip((plain, ours), optimizers, strict=True):
            loss = F.cross_entropy(model(x[pick]), pick % 5)
            optimizer.zero_grad()
            loss.backward()
            br.check_finite(model)
            optimizer.step()
            pair.append(loss.item())
        losses.append(pair)
    steps = torch.tensor(losses)
    assert steps[-10:, 0].mean() < 0.5 * steps[:10, 0].mean()
    assert_close("losses", steps[:, 1], steps[:, 0], 1e-3)
    for (name, expected), got in zip(plain.named_parameters(), ours.parameters(), strict=True):
        if float(expected.detach().norm()) > 1e-4:  # a shift of all keys alike has a gradient of rounding errors
            assert_close(name, got, expected, 1e-3)


def test_a_transformer_keeps_both_ends_whole() -> None:
    """Patch convolution and classifier: few bytes, most of the gradient."""
    pytest.importorskip("timm")
    model = small_vit()
    rows = {row.name: row.keeps for row in br.razor_(model, br.RazorConfig(0.9)).replaced}
    assert rows["patch_embed.proj"] == rows["head"] == "input, all of it, int8"
    assert "0.9" in rows["blocks.0.attn.proj"]
    left = {row.name: row.reason for row in br.razor_(model, br.RazorConfig.paper(0.9)).left}
    assert set(left) == {"patch_embed.proj", "norm", "head"}
    assert model.blocks[0].mlp.fc1.razor.pruned.values == "float16"
    assert set(left.values()) == {"the paper leaves both ends of a transformer dense"}
    br.razor_(model, br.RazorConfig(0.9, head_sparsity=0.5))
    assert model.head.razor.pruned.sparsity == 0.5


@pytest.mark.parametrize(
    "model",
    [
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1, enable_nested_tensor=False),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)),
    ],
    ids=["a layer", "an encoder", "a convolutional network"],
)
def test_what_has_no_ends_is_pruned_throughout(model: nn.Module) -> None:
    br.razor_(model, br.RazorConfig(0.9, fill="zero"))
    pruned = [module.razor.pruned.sparsity for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert pruned == [0.9] * len(pruned)
    assert pruned


def test_the_classifier_of_a_convolutional_network_is_kept_whole_where_the_dropped_are_guessed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    for fields, sparsity, values in (
        ({}, 0.0, "int8"),
        ({"values": "float32"}, 0.0, "float32"),
        ({"fill": "zero"}, 0.9, "int4"),
        ({"head_sparsity": 0.5}, 0.5, "int8"),
    ):
        br.razor_(model, br.RazorConfig(0.9, **({"fill": "known", "values": "int4"} | fields)))
        assert (model[2].razor.pruned.sparsity, model[2].razor.pruned.values) == (sparsity, values)
        assert model[0].razor.pruned.sparsity == 0.9
