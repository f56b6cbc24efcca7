"""What is compared: the rows of the step benchmark, as plain picklable values that build a training step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

import backrazor as br
from transfer.models import build_backbone
from transfer.training.checkpointing import apply_checkpointing
from transfer.training.methods import apply_method, set_train_mode

BATCH = {"vit_b16": 16}  # images per step; 8 for the convolutional networks
CLASSES = 100
MAIN = ("dense", "checkpointing by block", "compact 0.9", "compact 0.95", "compact 0.97")


@dataclass(frozen=True)
class Row:
    """One way to run the step of one backbone.

    razor: None for the plain network, else (preset, sparsity). micro: images per micro-batch, None for the whole batch
        at once. bn: "frozen" (affine and statistics, as in the paper's recipes) or "train". compiled: by torch.compile.
    """

    backbone: str
    label: str
    razor: tuple[str, float] | None = None
    checkpointing: str = "none"
    micro: int | None = None
    bn: str = "frozen"
    offload: bool = False
    compiled: bool = False
    precision: str = "float32"
    image: int = 224
    batch: int | None = None
    device: str = "cpu"

    @property
    def images(self) -> int:
        return self.batch or BATCH.get(self.backbone, 8)

    def build(self) -> br.memory.Step:
        """The training step: random weights with batch norm statistics of their own, SGD with momentum,
        cross-entropy."""
        torch.manual_seed(0)
        config = {"name": self.backbone, "pretrained": False, "weights": None, "drop_rate": 0.0, "head_init": "linear"}
        backbone = build_backbone(config, CLASSES, "pretrain")
        model = backbone.model.to(self.device)
        images = torch.randn(self.images, 3, self.image, self.image, device=self.device)
        labels = torch.randint(CLASSES, (self.images,), device=self.device)
        _settle_batch_norm(model, images)
        state = {"frozen": "frozen", "train": "train"}[self.bn]
        statistics = "frozen" if self.bn == "frozen" else "batch"
        frozen = apply_method(model, backbone.head, {"name": "full", "bn_affine": state, "bn_stats": statistics})
        if self.razor is not None:
            preset, sparsity = self.razor
            br.razor_(model, getattr(br.RazorConfig, preset)(sparsity))
        apply_checkpointing(model, backbone.stages, self.checkpointing)
        set_train_mode(model, frozen)
        if self.compiled:
            model.compile()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4, momentum=0.9)

        def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            saving = torch.autograd.graph.save_on_cpu(pin_memory=True) if self.offload else nullcontext()
            with saving, torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16"):
                logits = model(x)
            return F.cross_entropy(logits.float(), y)

        def forward() -> torch.Tensor:
            if self.micro is None:
                return loss_of(images, labels)
            *first, last = zip(images.split(self.micro), labels.split(self.micro), strict=True)
            for x, y in first:  # all micro-batches but the last do their backward here
                (loss_of(x, y) * len(y) / self.images).backward()
            x, y = last
            return loss_of(x, y) * len(y) / self.images

        return br.memory.Step(model, forward, optimizer)

    def saved_bytes(self) -> int:
        """What autograd holds after the forward of this row (of one micro-batch, where there are several)."""
        step = self.build()
        if self.compiled:
            step.forward().backward()
            return _held_by(step)
        with br.memory.ledger(step.model) as ledger:
            loss = step.forward()
        del loss
        return ledger.total_bytes


def _held_by(step: br.memory.Step) -> int:
    """The same of a compiled step, whose layers cannot be told apart: storages once, parameters and buffers apart."""
    held: dict[int, torch.Tensor] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        held[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = step.forward()
    alive = {x.untyped_storage().data_ptr() for x in (*step.model.parameters(), *step.model.buffers())}
    found = sum(x.untyped_storage().nbytes() for at, x in held.items() if at not in alive)
    del loss
    return found


def has_compiler() -> bool:
    """Whether there is the C++ compiler that ``torch.compile`` needs on the CPU."""
    return any(map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++")))


def _settle_batch_norm(model: nn.Module, images: torch.Tensor) -> None:
    """Statistics of the network's own activations, and scales of one: with those of a fresh network, frozen, signals
    would die out with depth and gradients be zero, where a pretrained network's are of order one."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_parameters()
    update_bn([images], model)


def micro_batch(backbone: str, precision: str, images: int) -> int:
    """The largest micro-batch of the plain network whose predicted peak is at most that of compact 0.9 on the whole
    batch; 1 where even that one peaks higher."""
    (budget,) = predictions(Row(backbone, "", razor=("compact", 0.9), precision=precision), [images])
    sizes = [size for size in range(1, images) if images % size == 0]
    plain = predictions(Row(backbone, "", precision=precision), sizes)
    fitting = [size for size, one in zip(sizes, plain, strict=True) if one.peak_bytes <= budget.peak_bytes]
    return max(fitting, default=1)


def predictions(row: Row, batches: Iterable[int]) -> list[br.memory.Prediction]:
    """The predicted memory of the step of ``row`` at each batch."""
    model = replace(row, batch=1).build().model
    autocast = torch.bfloat16 if row.precision == "bfloat16" else None
    return [br.memory.predict(model, (3, row.image, row.image), images, autocast=autocast) for images in batches]


def pinning_notice(row: Row) -> str:
    """Say what ``save_on_cpu`` is going to pin: memory that this machine cannot swap or give to anybody else."""
    (dense,) = predictions(replace(row, offload=False), [row.images])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{row.label} pins about {dense.saved_bytes / 1e9:.1f} GB of memory, of which {free / 1e9:.1f} GB are free"
    return f"warning: {text}" if dense.saved_bytes > free / 2 else text


def rows_of(backbone: str, precision: str = "float32", device: str = "cpu", batch: int | None = None) -> list[Row]:
    """All rows of one backbone, dense first. ``save_on_cpu`` is a rival on a device with memory of its own only, and
    compiled rows are there where there is a C++ compiler."""
    shared: dict = {"backbone": backbone, "precision": precision, "device": device, "batch": batch}
    micro = micro_batch(backbone, precision, Row(label="", **shared).images)
    rows = [
        Row(label="dense", **shared),
        Row(label="checkpointing by block", checkpointing="block", **shared),
        Row(label="checkpointing by stage", checkpointing="stage", **shared),
        Row(label=f"micro-batches of {micro}", micro=micro, **shared),
        Row(label="int8", razor=("int8", 0.0), **shared),
        Row(label="paper 0.9", razor=("paper", 0.9), **shared),
        Row(label="paper 0.97", razor=("paper", 0.97), **shared),
        Row(label="compact 0.9", razor=("compact", 0.9), **shared),
        Row(label="compact 0.95", razor=("compact", 0.95), **shared),
        Row(label="compact 0.97", razor=("compact", 0.97), **shared),
        Row(label="compact 0.9 + checkpointing", razor=("compact", 0.9), checkpointing="block", **shared),
    ]
    if has_compiler():
        rows.append(Row(label="compile", compiled=True, **shared))
        rows.append(Row(label="compact 0.97 + compile", razor=("compact", 0.97), compiled=True, **shared))
    if device != "cpu":
        rows.insert(3, Row(label="save_on_cpu", offload=True, **shared))
    if backbone != "vit_b16":
        rows.insert(1, Row(label="dense, BN trained", bn="train", **shared))
    return rows
