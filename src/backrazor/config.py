"""The whole configuration of the library: one frozen dataclass, its presets, and what its words mean in bits."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple


class Word(NamedTuple):
    """A field of ``RazorConfig`` that takes one of a few words: what it decides, and the words."""

    meaning: str
    choices: tuple[str, ...]


WORDS = {
    "values": Word("type of kept values", ("float32", "float16", "bfloat16", "int8", "int4", "paper")),
    "index": Word("index format", ("auto", "bitmap", "tile")),
    "fill": Word("what backward reads for a dropped element", ("zero", "mean", "known")),
    "norm": Word("how norm layers keep their input", ("dense", "pruned", "bfloat16", "int8", "int4")),
    "batch_norm": Word(
        "how batch norm on batch statistics keeps its input", ("dense", "pruned", "bfloat16", "int8", "int4")
    ),
    "activation": Word(
        "how smooth activations keep their derivative", ("dense", "float16", "int8", "int4", "int2", "auto")
    ),
    "attention": Word("how attention keeps q, k, v and scores", ("dense", "pruned", "int8", "int4")),
    "gate": Word("how the product of an activation and another tensor keeps both", ("rest", "int8", "int4")),
    "rest": Word("how what autograd keeps beside the layers above is kept", ("dense", "int8")),
}
_BITS = {"int8": 8, "int4": 4, "int2": 2}


def bits_of(word: str) -> int | None:
    """Bits per element of an integer form: 8, 4 or 2 for "int8", "int4" or "int2". None for every other word."""
    return _BITS.get(word)


@dataclass(frozen=True, slots=True)
class RazorConfig:
    """What is kept for backward. The forward pass is never changed.

    Attributes:
        sparsity: share of each sample's activation that is dropped, in [0, 1); 0 keeps all of it and stores no index.
        head_sparsity: the same for the classifier's input; None means ``sparsity``.
        values: how kept values are stored: "float32" (lossless in any input type), "float16", "bfloat16", "int8" or
            "int4" (with one bfloat16 scale per 256 values), or "paper" (convolutions float32, Linear and attention
            float16, the Linear head of a network with convolutions int8). A 16-bit input keeps its own type under
            every 16- or 32-bit choice. Under "int4" the inputs that are kept whole at the ends of a network (image
            and classifier) and on maps of fewer than four positions take 8 bits.
        index: how positions are stored: "bitmap" (one bit per element), "tile" (8-bit offsets in tiles of 256 elements
            and one count per tile) or "auto", the smaller of the two for each layer.
        fill: what backward reads for a dropped element. "zero" is the paper's rule. "mean" is the mean of its channel,
            or of its feature over the tokens, and what is kept is the largest of what differs from it; inputs of
            convolutions that come from no activation are kept whole instead, as averages of blocks in 4 bits, and so
            is a convolutional network's classifier, in 8 bits. "known" is "mean", but zero where the bit that a ReLU
            keeps anyway says so, in all but depthwise convolutions of more than three columns. Under both, the
            projection behind a quantised attention reads its input from the codes of q, k and v where tokens are few.
        norm: what LayerNorm, GroupNorm and BatchNorm on batch statistics keep of their input: "dense", "pruned",
            "bfloat16", or the normalised input in "int8" or "int4" with one float16 scale per row.
        batch_norm: the same for BatchNorm on batch statistics alone; None means ``norm``.
        activation: what smooth activations (GELU, SiLU, Hardswish) keep: "dense", "float16" (the input), or the
            derivative quantised to 256, 16 or 4 levels ("int8", "int4", "int2"); "auto" is "int2" for GELU in a network
            with attention and "int4" otherwise. ReLU, ReLU6 and Hardtanh always keep
            one bit per element.
        attention: "pruned" prunes q, k, the softmax output and v, as the paper does. "int8" and "int4" quantise q, k
            and v row by row and recompute the softmax in backward. "dense" leaves attention alone.
        gate: how the product of an activation's output and a tensor of the same shape, as in gated MLPs, keeps the two:
            "int8" or "int4" with a scale and a middle per run of about 64 elements, and the Linear behind reads its
            input from them; or "rest", as ``rest`` says.
        rest: what becomes of the other float tensors that autograd keeps while the model runs, from 1,024 elements on:
            "int8" stores them in 8 bits with a float16 scale per block of 64 to 512 elements, "dense" leaves them.

    Raises:
        ValueError: a field is out of range; the message names the field, the value and what is allowed.
    """

    sparsity: float = 0.9
    head_sparsity: float | None = None
    values: str = "int4"
    index: str = "auto"
    fill: str = "known"
    norm: str = "int4"
    batch_norm: str | None = None
    activation: str = "auto"
    attention: str = "int4"
    gate: str = "int4"
    rest: str = "int8"

    def __post_init__(self) -> None:
        _check_share("sparsity", self.sparsity)
        if self.head_sparsity is not None:
            _check_share("head_sparsity", self.head_sparsity)
        for name, word in WORDS.items():
            value = getattr(self, name)
            if value not in word.choices and not (name == "batch_norm" and value is None):
                allowed = (*word.choices, "None") if name == "batch_norm" else word.choices
                raise ValueError(f"{name}={value!r} is not known: use one of {', '.join(allowed)}")

    @classmethod
    def compact(cls, sparsity: float = 0.9, **changes: Any) -> RazorConfig:
        """The default: what this library recommends, chosen by the gradient table in docs/gradients.md."""
        return replace(cls(sparsity=sparsity), **changes)

    @classmethod
    def paper(cls, sparsity: float = 0.9, **changes: Any) -> RazorConfig:
        """What the released code of the paper stores (Jiang et al., NeurIPS 2022,
        https://openreview.net/forum?id=mTXQIpXPDbh)."""
        preset = cls(
            sparsity=sparsity,
            values="paper",
            index="bitmap",
            fill="zero",
            norm="pruned",
            batch_norm="dense",
            activation="float16",
            attention="pruned",
            gate="rest",
            rest="dense",
        )
        return replace(preset, **changes)

    @classmethod
    def int8(cls, sparsity: float = 0.0, **changes: Any) -> RazorConfig:
        """Nothing pruned, everything at 8 bits: the idea of Mesa (Pan et al., https://arxiv.org/abs/2111.11124)."""
        preset = cls(
            sparsity=sparsity,
            values="int8",
            fill="zero",
            norm="int8",
            activation="int8",
            attention="int8",
            gate="int8",
        )
        return replace(preset, **changes)

    def describe(self) -> str:
        """One line with every field."""
        return ", ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


def _check_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={value!r} is not a number: use a share of at least 0 and below 1, such as 0.9")
    if not math.isfinite(value) or not 0 <= value < 1:
        raise ValueError(f"{name}={value!r} is out of range: use a share of at least 0 and below 1, such as 0.9")
