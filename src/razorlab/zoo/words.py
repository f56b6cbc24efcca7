"""The families of transformers, each in a tiny configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .cases import Case, floats

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
            return model, lambda model: floats(model(**inputs))

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
