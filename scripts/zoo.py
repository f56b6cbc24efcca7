"""Razor one network of every family that torchvision, timm and transformers bring, and say how it went.

    python scripts/zoo.py                          # all that are not in outputs/zoo.csv yet; an hour or two on one core
    python scripts/zoo.py --only 'timm/swin*'      # those that match a pattern
    python scripts/zoo.py --again --only '*/llama' # measure anew
    python scripts/zoo.py --list                   # names
    python scripts/zoo.py --summary                # medians, and families below the bars, of what has been measured
    python scripts/zoo.py --markdown               # the table of docs/networks.md

Each row is written as soon as it is measured, so an interrupted run is taken up by the same command. A row holds, for
one network with random weights on a batch of two random inputs (four images for torchvision's classifiers):

forward       "bits": the output equals that of the dense network in every bit; "formula": that of the dense network
              with attention written out, softmax(q k^T) v; else the largest difference relative to the largest output
dense, saved  MB (1e6 bytes) that autograd holds after the model's forward, dense and razored, without the loss
ratio         dense / saved
cosine, norm  of the razored gradient of all parameters to the dense one, and its norm relative to that
left dense    share of the saved bytes that are still dense, and the largest of them
replaced      layers that became drop-ins

Everything runs on one thread.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import backrazor as br

ROOT = Path(__file__).resolve().parents[1]
FAMILY_BAR = 4.0
MEDIAN_BARS = {"torchvision": 9.0, "timm": 8.0, "transformers": 8.0}
OWN_BARS = {"transformers/llama": 8.0, "transformers/qwen3": 8.0, "transformers/gpt2": 8.0}
LARGEST = 120_000_000  # parameters of a network that is tried
COSINE_MEDIAN, COSINE_LOW = 0.9, 0.8


@dataclass
class Row:
    """One line of the table; see the module's text."""

    name: str
    network: str
    forward: str = ""
    dense_mb: float = 0.0
    saved_mb: float = 0.0
    ratio: float = 0.0
    cosine: float = 0.0
    norm: float = 0.0
    left_dense: float = 0.0
    largest_dense: str = ""
    replaced: int = 0
    seconds: float = 0.0
    error: str = ""


@dataclass
class Case:
    """A network to try: ``make`` gives the module and a function that runs it to a list of float outputs."""

    name: str
    network: str
    make: Callable[[], tuple[nn.Module, Callable[[nn.Module], list[Tensor]]]]


# torchvision: family -> its smallest network
_CLASSIFIERS = {
    "alexnet": "alexnet",
    "convnext": "convnext_tiny",
    "densenet": "densenet121",
    "efficientnet": "efficientnet_b0",
    "efficientnetv2": "efficientnet_v2_s",
    "googlenet": "googlenet",
    "inception": "inception_v3",
    "maxvit": "maxvit_t",
    "mnasnet": "mnasnet0_5",
    "mobilenetv2": "mobilenet_v2",
    "mobilenetv3": "mobilenet_v3_small",
    "regnet": "regnet_y_400mf",
    "resnet": "resnet18",
    "resnext": "resnext50_32x4d",
    "shufflenetv2": "shufflenet_v2_x0_5",
    "squeezenet": "squeezenet1_1",
    "swin": "swin_t",
    "swinv2": "swin_v2_t",
    "vgg": "vgg11",
    "vgg_bn": "vgg11_bn",
    "vit": "vit_b_16",
}
_SEGMENTATION = {
    "deeplabv3": "deeplabv3_mobilenet_v3_large",
    "fcn": "fcn_resnet50",
    "lraspp": "lraspp_mobilenet_v3_large",
}
_DETECTION = {
    "fasterrcnn": "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_resnet50": "fasterrcnn_resnet50_fpn",
    "fcos": "fcos_resnet50_fpn",
    "keypointrcnn": "keypointrcnn_resnet50_fpn",
    "maskrcnn": "maskrcnn_resnet50_fpn",
    "retinanet": "retinanet_resnet50_fpn",
    "ssd": "ssd300_vgg16",
    "ssdlite": "ssdlite320_mobilenet_v3_large",
}
_VIDEO = {
    "r3d": "r3d_18",
    "mc3": "mc3_18",
    "r2plus1d": "r2plus1d_18",
    "s3d": "s3d",
    "mvit": "mvit_v1_b",
    "swin3d": "swin3d_t",
}


def _floats(output: Any) -> list[Tensor]:
    """The float tensors of an output that depend on what is trained, each once."""
    leaves = list(output.values()) if isinstance(output, dict) else output
    found = [x for x in tree_leaves(leaves) if isinstance(x, Tensor) and x.is_floating_point()]
    return list({id(x): x for x in found}.values())


def torchvision_cases() -> Iterator[Case]:
    import torchvision

    def images(network: str, size: int, batch: int) -> Callable:
        def make() -> tuple:
            options = {"init_weights": True} if network in ("googlenet", "inception_v3") else {}
            model = torchvision.models.get_model(network, weights=None, **options)
            x = torch.randn(batch, 3, size, size)
            return model, lambda model: _floats(model(x))

        return make

    def segmentation(network: str) -> Callable:
        def make() -> tuple:
            model = torchvision.models.get_model(network, weights=None, weights_backbone=None, num_classes=21)
            x = torch.randn(2, 3, 160, 160)
            return model, lambda model: _floats(model(x))

        return make

    def detection(network: str) -> Callable:
        def make() -> tuple:
            options = {} if network.startswith("ssd") else {"min_size": 256, "max_size": 320}
            model = torchvision.models.get_model(network, weights=None, weights_backbone=None, num_classes=5, **options)
            x = list(torch.rand(2, 3, 256, 256))
            target = {
                "boxes": torch.tensor([[20.0, 30.0, 120.0, 160.0], [60.0, 60.0, 200.0, 220.0]]),
                "labels": torch.tensor([1, 2]),
                "masks": torch.zeros(2, 256, 256, dtype=torch.uint8).index_fill(1, torch.arange(60, 160), 1),
                "keypoints": torch.rand(2, 17, 3) * torch.tensor([60.0, 60.0, 0.0]) + torch.tensor([60.0, 60.0, 1.0]),
            }
            return model, lambda model: _floats(model(x, [dict(target) for _ in x]))

        return make

    def video(network: str) -> Callable:
        def make() -> tuple:
            model = torchvision.models.get_model(network, weights=None)
            frames, size = {"s3d": (16, 112), "mvit_v1_b": (16, 224), "swin3d_t": (8, 112)}.get(network, (8, 112))
            x = torch.randn(1, 3, frames, size, size)
            return model, lambda model: _floats(model(x))

        return make

    for family, network in _CLASSIFIERS.items():
        size = {"inception_v3": 299, "maxvit_t": 224}.get(
            network, 160 if "swin" not in network and "vit" not in network else 224
        )
        yield Case(f"torchvision/{family}", network, images(network, size, 2 if size > 160 else 4))
    for family, network in _SEGMENTATION.items():
        yield Case(f"torchvision/{family}", network, segmentation(network))
    for family, network in _DETECTION.items():
        yield Case(f"torchvision/{family}", network, detection(network))
    for family, network in _VIDEO.items():
        yield Case(f"torchvision/{family}", network, video(network))


_SIZES = ("femto", "atto", "pico", "nano", "xxs", "xxt", "xx_small", "x_small", "xs", "tiny", "lite", "050", "xsmall")
_SIZES += ("mini", "small", "_t", "_s", "b0", "a0", "18", "16", "26")


def _smallest_first(name: str) -> tuple[int, int, str]:
    """Names in the order of the size that they promise, roughly."""
    rank = next((i for i, word in enumerate(_SIZES) if word in name), len(_SIZES))
    return rank, sum(map(int, re.findall(r"\d+", name))), name


def timm_cases() -> Iterator[Case]:
    """The smallest network of every module of timm: of the five whose names promise least, by parameters."""
    import timm

    cache = ROOT / "outputs" / "zoo_timm.txt"
    known = dict(line.split() for line in cache.read_text().splitlines()) if cache.exists() else {}
    if not known:
        for module in timm.list_modules():
            counts = []
            for name in sorted(timm.list_models(module=module), key=_smallest_first)[:5]:
                try:
                    with torch.device("meta"):
                        model = timm.create_model(name)
                except Exception:  # not on meta tensors, or it asks for a download
                    continue
                counts.append((sum(p.numel() for p in model.parameters()), name))
            if counts:
                known[module] = min(counts)[1]
        cache.parent.mkdir(exist_ok=True)
        cache.write_text("".join(f"{module} {name}\n" for module, name in sorted(known.items())))

    def make_of(network: str) -> Callable:
        def make() -> tuple:
            with torch.device("meta"):
                count = sum(p.numel() for p in timm.create_model(network).parameters())
            if count > LARGEST:
                raise ValueError(f"not tried: {count / 1e6:.0f} million parameters, more than {LARGEST / 1e6:.0f}")
            model = timm.create_model(network)
            x = torch.randn(2, *timm.data.resolve_data_config({}, model=model)["input_size"])
            return model, lambda model: _floats(model(x))

        return make

    for module, network in sorted(known.items()):
        yield Case(f"timm/{module}", network, make_of(network))


# What a tiny configuration is, by the names that configurations use; those that a class does not know are left out.
_TINY = {
    "vocab_size": 128,
    "decoder_vocab_size": 128,
    "hidden_size": 128,
    "dim": 128,
    "d_model": 128,
    "n_embd": 128,
    "emb_dim": 128,
    "embedding_size": 128,
    "intermediate_size": 256,
    "hidden_dim": 256,
    "ffn_dim": 256,
    "d_ff": 256,
    "d_inner": 256,
    "ffn_hidden_size": 256,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "num_hidden_layers": 2,
    "n_layers": 2,
    "n_layer": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "n_heads": 4,
    "n_head": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 32,
    "d_kv": 32,
    "d_head": 32,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "use_cache": False,
}
_VISION = {"image_size": 96, "patch_size": 8}
_HIERARCHY = {
    "swin": {
        "image_size": 64,
        "patch_size": 2,
        "embed_dim": 32,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 8,
    },
    "swinv2": {
        "image_size": 64,
        "patch_size": 2,
        "embed_dim": 32,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 8,
    },
    "convnext": {"hidden_sizes": [32, 64], "depths": [2, 2], "num_stages": 2, "image_size": 96},
    "convnextv2": {"hidden_sizes": [32, 64], "depths": [2, 2], "num_stages": 2, "image_size": 96},
    "resnet": {"embedding_size": 32, "hidden_sizes": [64, 128], "depths": [2, 2]},
    "regnet": {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [2, 2], "groups_width": 16},
    "segformer": {"hidden_sizes": [32, 64, 64, 128], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]},
    "pvt": {
        "image_size": 96,
        "hidden_sizes": [32, 64, 64, 128],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 4],
    },
    "mobilevit": {"image_size": 128, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [16, 24, 32, 48, 64, 80, 160]},
    "poolformer": {"hidden_sizes": [32, 64, 64, 128], "depths": [1, 1, 1, 1]},
    "levit": {"image_size": 224, "hidden_sizes": [64, 128, 128], "depths": [1, 1, 1], "num_attention_heads": [2, 4, 4]},
    "mobilenet_v2": {"image_size": 96},
    "efficientnet": {"image_size": 96, "width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
}
_TEXT = [
    "bert",
    "roberta",
    "distilbert",
    "albert",
    "electra",
    "deberta-v2",
    "mpnet",
    "modernbert",
    "xlm-roberta",
    "camembert",
    "fnet",
    "squeezebert",
    "nystromformer",
    "longformer",
    "roformer",
    "convbert",
    "funnel",
    "xlnet",
]
_DECODERS = [
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "opt",
    "bloom",
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen2_moe",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "falcon",
    "olmo",
    "olmo2",
    "stablelm",
    "starcoder2",
    "granite",
    "cohere",
    "glm",
    "mamba",
    "codegen",
    "smollm3",
    "ministral",
]
_SEQ2SEQ = ["t5", "bart", "mbart", "pegasus", "marian", "m2m_100"]
_IMAGES = [
    "vit",
    "deit",
    "beit",
    "dinov2",
    "yolos",
    "vit_mae",
    "swin",
    "swinv2",
    "convnext",
    "convnextv2",
    "resnet",
    "regnet",
    "segformer",
    "pvt",
    "mobilevit",
    "poolformer",
    "levit",
    "mobilenet_v2",
    "efficientnet",
]
_AUDIO = ["wav2vec2", "hubert", "whisper", "audio-spectrogram-transformer"]
_PAIRS = ["clip", "siglip", "vilt"]


_OWN = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 16},
    "codegen": {"rotary_dim": 16},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_head": 32},
    "yolos": {"image_size": [96, 96], "num_detection_tokens": 10},
}


def _config(kind: str, **more: Any) -> Any:
    from transformers import AutoConfig

    known = AutoConfig.for_model(kind).to_dict()
    chosen = {key: value for key, value in ({**_TINY, **more, **_OWN.get(kind, {})}).items() if key in known}
    if kind == "funnel":
        chosen.pop("num_hidden_layers", None)  # counted from the blocks
    if kind in _HIERARCHY:
        chosen = dict(_HIERARCHY[kind])
    return AutoConfig.for_model(kind, **chosen)


def transformers_cases() -> Iterator[Case]:
    import transformers

    def of(kind: str, auto: str, batch: Callable[[Any], dict[str, Any]], **more: Any) -> Case:
        def make() -> tuple:
            config = _config(kind, **more)
            model = getattr(transformers, auto).from_config(config)
            inputs = batch(model.config)
            return model, lambda model: _floats(model(**inputs))

        return Case(f"transformers/{kind}", auto, make)

    def tokens(config: Any) -> dict[str, Any]:
        return {"input_ids": torch.randint(3, 128, (2, 128))}

    def pairs_of_tokens(config: Any) -> dict[str, Any]:
        return {**tokens(config), "decoder_input_ids": torch.randint(3, 128, (2, 128))}

    def pictures(config: Any) -> dict[str, Any]:
        size = getattr(config, "image_size", 96)
        return {"pixel_values": torch.randn(2, 3, size, size) if isinstance(size, int) else torch.randn(2, 3, *size)}

    def sound(config: Any) -> dict[str, Any]:
        if config.model_type == "whisper":
            features = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions)
            return {"input_features": features, "decoder_input_ids": torch.randint(3, 128, (2, 128))}
        if config.model_type == "audio-spectrogram-transformer":
            return {"input_values": torch.randn(2, config.max_length, config.num_mel_bins)}
        return {"input_values": torch.randn(2, 48000)}

    for kind in _TEXT:
        yield of(kind, "AutoModel", tokens)
    for kind in _DECODERS:
        yield of(kind, "AutoModelForCausalLM", tokens)
    for kind in _SEQ2SEQ:
        yield of(kind, "AutoModelForSeq2SeqLM", pairs_of_tokens)
    for kind in _IMAGES:
        yield of(kind, "AutoModel", pictures, **_VISION)
    for kind in _AUDIO:
        sizes = {"max_source_positions": 128, "max_target_positions": 128, "max_length": 256, "num_mel_bins": 64}
        shapes = {"conv_dim": [64] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
        quiet = {"mask_time_prob": 0.0, "apply_spec_augment": False}
        yield of(kind, "AutoModel", sound, **sizes, **shapes, **quiet)

    small = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**small, "vocab_size": 128, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**small, "image_size": 96, "patch_size": 8}
    for kind in ("clip", "siglip"):
        yield of(
            kind,
            "AutoModel",
            lambda config: {**tokens(config), "pixel_values": torch.randn(2, 3, 96, 96)},
            text_config=text,
            vision_config=vision,
            projection_dim=64,
        )
    yield of(
        "vilt", "AutoModel", lambda config: {**tokens(config), "pixel_values": torch.randn(2, 3, 96, 96)}, **_VISION
    )


def cases(patterns: list[str]) -> Iterator[Case]:
    """Those whose names match one of ``patterns``."""
    groups = {"torchvision": torchvision_cases, "timm": timm_cases, "transformers": transformers_cases}
    for group, found in groups.items():
        if any(fnmatchcase(group, pattern.partition("/")[0]) for pattern in patterns):
            yield from (case for case in found() if any(fnmatchcase(case.name, pattern) for pattern in patterns))


class _WrittenOut(TorchFunctionMode):
    """``F.scaled_dot_product_attention`` by its formula, as the razored operator computes it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return self._attention(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if enable_gqa and k.shape[-3] != q.shape[-3]:
            k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
        scores = (q * scale) @ k.transpose(-2, -1)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill_(~attn_mask, float("-inf"))
            scores = scores + attn_mask
        p = scores.softmax(-1)
        if dropout_p > 0:
            p = p * F.dropout(torch.ones_like(p), dropout_p, True)
        return p @ v


def _loss(outputs: list[Tensor]) -> Tensor:
    """A scalar whose gradient is neither constant nor tiny, by a random target for each output."""
    generator = torch.Generator().manual_seed(3)
    parts = []
    for x in outputs:
        if not x.requires_grad:
            continue
        target = torch.randn(x.shape, generator=generator)
        parts.append((x.float() * target).sum() / max(x.numel(), 1) ** 0.5 if x.dim() else x.float())
    return torch.stack(parts).sum()


def _run(model: nn.Module, run: Callable[[nn.Module], list[Tensor]], formula: bool) -> tuple:
    """(outputs, gradients, saved bytes, rows) of one training step under fixed random numbers."""
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    for module in model.modules():  # statistics move in training: every run starts from the same
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
    with br.memory.ledger(model) as book:
        if formula:
            with _WrittenOut():
                outputs = run(model)
        else:
            outputs = run(model)
    rows = book.rows
    _loss(outputs).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [x.detach() for x in outputs], gradients, sum(row.bytes for row in rows), rows


def _compared(dense: dict[str, Tensor], razored: dict[str, Tensor]) -> tuple[float, float]:
    product = ours = theirs = 0.0
    for name, g in dense.items():
        if not g.isfinite().all():  # as some networks have with random weights
            continue
        h = razored.get(name)
        h = torch.zeros_like(g) if h is None else h
        product += float((g.double() * h.double()).sum())
        theirs += float(g.double().square().sum())
        ours += float(h.double().square().sum())
    scale = (ours * theirs) ** 0.5
    return (product / scale if scale else float("nan")), (ours / theirs) ** 0.5 if theirs else float("nan")


def measure(case: Case, config: br.RazorConfig) -> Row:
    """Run one case."""
    row, start = Row(case.name, case.network), time.perf_counter()
    try:
        torch.manual_seed(0)
        model, run = case.make()
        model.train()
        plain, gradients, dense, _ = _run(model, run, formula=False)
        written, *_ = _run(model, run, formula=True)
        row.replaced = len(br.razor_(model, config).replaced)
        outputs, razored, saved, rows = _run(model, run, formula=False)
        row.forward = _difference(plain, outputs)
        if row.forward != "bits" and _difference(written, outputs) == "bits":
            row.forward = "formula"
        row.dense_mb, row.saved_mb, row.ratio = dense / 1e6, saved / 1e6, dense / max(saved, 1)
        row.cosine, row.norm = _compared(gradients, razored)
        left = [r for r in rows if r.role == "dense"]
        row.left_dense = sum(r.bytes for r in left) / max(saved, 1)
        top = sorted(left, key=lambda r: -r.bytes)[:2]
        row.largest_dense = "; ".join(f"{r.module or 'model'} {r.bytes / saved:.0%} {r.reason}" for r in top)
        if os.environ.get("ZOO_LEDGER"):
            _print_ledger(rows, saved)
    except Exception as error:
        row.error = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:200]
    row.seconds = time.perf_counter() - start
    return row


def _print_ledger(rows: list[Any], saved: int) -> None:
    """What is saved, with layers of one kind together."""
    totals: dict[tuple[str, str, str], int] = {}
    for r in rows:
        key = re.sub(r"\d+", "*", r.module), r.role, r.reason
        totals[key] = totals.get(key, 0) + r.bytes
    for (module, role, reason), size in sorted(totals.items(), key=lambda item: -item[1])[:25]:
        print(f"    {size / saved:6.1%}  {module or 'model':50} {role:14} {reason}")


def _difference(expected: list[Tensor], got: list[Tensor]) -> str:
    if len(expected) != len(got):
        return f"{len(got)} outputs for {len(expected)}"
    if all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)):
        return "bits"
    worst = max(
        float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
        for a, b in zip(expected, got, strict=True)
        if a.numel()
    )
    return f"{worst:.0e}"


def _read(path: Path) -> dict[str, Row]:
    if not path.exists():
        return {}
    kinds = {field.name: field.type for field in fields(Row)}
    cast = {"str": str, "float": float, "int": int}
    with path.open(newline="") as file:
        rows = [Row(**{key: cast[kinds[key]](value) for key, value in line.items()}) for line in csv.DictReader(file)]
    return {row.name: row for row in rows}


def _write(path: Path, rows: dict[str, Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(Row)])
        for name in sorted(rows):
            values = (getattr(rows[name], field.name) for field in fields(Row))
            writer.writerow([f"{value:.4g}" if isinstance(value, float) else value for value in values])


def _line(row: Row) -> str:
    if row.error:
        return f"{row.name:34} {row.seconds:5.1f} s  {row.error}"
    return (
        f"{row.name:34} {row.seconds:5.1f} s  {row.dense_mb:8.2f} / {row.saved_mb:7.2f} MB = {row.ratio:5.1f}x  cosine "
        f"{row.cosine:6.3f}  norm {row.norm:5.2f}  dense {row.left_dense:4.0%}  {row.forward:7} {row.replaced:4d}  "
        f"{row.largest_dense}"
    )


def summary(rows: dict[str, Row]) -> str:
    """Medians beside the bars, and every family that is below one."""
    lines = []
    for group, bar in MEDIAN_BARS.items():
        here = [row for name, row in rows.items() if name.startswith(f"{group}/")]
        good = [row for row in here if not row.error]
        if not good:
            continue
        ratio, cosine = (statistics.median(getattr(row, key) for row in good) for key in ("ratio", "cosine"))
        lines.append(
            f"{group}: {len(good)} families, {len(here) - len(good)} failed; dense / saved {ratio:.1f}x in the median "
            f"(bar {bar:g}), cosine {cosine:.3f} (bar {COSINE_MEDIAN})"
        )
        low = sorted((row for row in good if row.ratio < OWN_BARS.get(row.name, FAMILY_BAR)), key=lambda row: row.ratio)
        lines += [f"  below {OWN_BARS.get(row.name, FAMILY_BAR):g}x: {_line(row)}" for row in low]
        bent = sorted((row for row in good if row.cosine < COSINE_LOW), key=lambda row: row.cosine)
        lines += [f"  cosine below {COSINE_LOW}: {_line(row)}" for row in bent]
        moved = [row for row in good if row.forward not in ("bits", "formula")]
        lines += [f"  forward not equal in bits: {row.name} {row.forward}" for row in moved]
        lines += [f"  failed: {_line(row)}" for row in here if row.error]
    return "\n".join(lines)


def markdown(rows: dict[str, Row]) -> str:
    """The table of docs/networks.md."""
    lines = [
        "| family | network | forward | dense MB | saved MB | ratio | cosine | left dense | replaced |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(rows):
        row = rows[name]
        if row.error:
            lines.append(f"| {name} | {row.network} | {row.error} | | | | | | |")
            continue
        lines.append(
            f"| {name} | {row.network} | {row.forward} | {row.dense_mb:.2f} | {row.saved_mb:.2f} | {row.ratio:.1f} | "
            f"{row.cosine:.3f} | {row.left_dense:.0%} | {row.replaced} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", action="append", metavar="PATTERN", help="names to run, with wildcards; may be repeated"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "zoo.csv", help="the CSV (outputs/zoo.csv)")
    parser.add_argument("--again", action="store_true", help="measure what the CSV holds already, too")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=WORD", help="another field of RazorConfig")
    parser.add_argument("--minutes", type=float, help="stop after this time; the same command goes on from there")
    for flag, text in (
        ("list", "print names"),
        ("summary", "print what the CSV says"),
        ("markdown", "print its table"),
    ):
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    chosen = parser.parse_args()
    rows, patterns = _read(chosen.out), chosen.only or ["*"]
    if chosen.summary or chosen.markdown:
        print(markdown(rows) if chosen.markdown else summary(rows))
        return 0
    config = br.RazorConfig(chosen.sparsity, **dict(item.split("=", 1) for item in chosen.set))
    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here has pretrained weights
    warnings.simplefilter("ignore")
    start = time.monotonic()
    for case in cases(patterns):
        if chosen.list:
            print(case.name, case.network)
            continue
        if case.name in rows and not chosen.again:
            continue
        if chosen.minutes is not None and time.monotonic() - start > 60 * chosen.minutes:
            print("time is up; the same command goes on from here")
            break
        rows[case.name] = row = measure(case, config)
        print(_line(row), flush=True)
        _write(chosen.out, rows)
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
