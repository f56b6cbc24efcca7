"""What is compared: the rows of the step benchmark, as plain picklable values that build a training step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import backrazor as br
from razorlab import schema
from razorlab.settings import changed
from razorlab.training.costs import build_step

BATCH = {"vit_b16": 16}  # images per step; 8 for the convolutional networks
CLASSES = 100
MAIN = ("dense", "checkpointing by block", "compact 0.9", "compact 0.95", "compact 0.97")
TURNS = (0, 1, 2)  # values of ``turn_of``
BUDGETS = (0.7, 0.5, 0.3, 0.1)  # shares of the activations that the compiler may keep, the rest is computed again
FLOAT8 = {  # as it comes the pass takes bfloat16 from 100 MB on
    "quant_type": "torch.float8_e5m2",
    "allowed_dtypes": "torch.float32;torch.bfloat16",
    "size_in_mb": 0.01,
    "use_scaling": False,  # a float32 for each line: more than it saves where lines are short, such as 1 x 1 kernels
}


@dataclass(frozen=True)
class Row:
    """One way to run the step of one backbone.

    razor: None for the plain network, else (preset, sparsity). micro: images per micro-batch, None for the whole batch
        at once. bn: "frozen" (affine and statistics, as in the paper's recipes) or "train". compiled: by torch.compile.
        budget: of the activations that the compiled step may keep, as a share; float8: it keeps them at 8 bits.
    """

    backbone: str
    label: str
    razor: tuple[str, float] | None = None
    checkpointing: str = "none"
    micro: int | None = None
    bn: str = "frozen"
    offload: bool = False
    compiled: bool = False
    budget: float | None = None
    float8: bool = False
    method: str = "full"
    precision: str = "float32"
    image: int = 224
    batch: int | None = None
    device: str = "cpu"

    @property
    def images(self) -> int:
        return self.batch or BATCH.get(self.backbone, 8)

    def config(self) -> schema.Config:
        """The row as a configuration of the laboratory: what it sets otherwise than the defaults."""
        preset, sparsity = self.razor or ("none", 0.0)
        trained = self.bn == "train"
        return changed(
            task={"name": "classification"},
            model={"name": self.backbone, "pretrained": False, "head_init": "linear"},
            data={"name": "none", "image_size": self.image},
            method={
                "name": self.method,
                "bn_affine": "train" if trained else "frozen",
                "bn_stats": "batch" if trained else "frozen",
            },
            razor={"name": preset, "sparsity": sparsity},
            optim={"name": "sgd", "lr": 1e-4, "label_smoothing": 0.0},
            trainer={
                "device": self.device,
                "precision": self.precision,
                "checkpointing": self.checkpointing,
                "micro_batch": self.micro,
                "compile": self.compiled,
            },
        )

    def build(self) -> br.memory.Step:
        """The training step: random weights with batch norm statistics of their own, SGD with momentum,
        cross-entropy."""
        settle = partial(_settle_batch_norm, images=self.images, side=self.image)
        return build_step(self.config(), CLASSES, self.images, self.image, settle, self._saving())

    def _saving(self) -> Callable[[], AbstractContextManager[Any]]:
        """The context of each forward, whose first compiles the step."""
        if self.offload:
            return partial(torch.autograd.graph.save_on_cpu, pin_memory=True)
        if self.budget is None and not self.float8:
            return nullcontext
        return partial(_compiler_settings, self.budget, self.float8)

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


@contextmanager
def _compiler_settings(budget: float | None, float8: bool) -> Iterator[None]:
    """What PyTorch's partitioner finds when it splits a graph into forward and backward; afterwards it is as before."""
    import torch._functorch.config
    import torch._inductor.config

    with ExitStack() as stack:
        if budget is not None:
            stack.enter_context(torch._functorch.config.patch(activation_memory_budget=budget))
        if float8:
            passes = {"activation_quantization_aten_pass": FLOAT8}
            stack.enter_context(torch._inductor.config.patch(post_grad_fusion_options=passes))
        yield


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


def _settle_batch_norm(model: nn.Module, device: torch.device, images: int, side: int) -> None:
    """Statistics of the network's own activations, and scales of one: with those of a fresh network, frozen, signals
    would die out with depth and gradients be zero, where a pretrained network's are of order one."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_parameters()
    update_bn([torch.randn(images, 3, side, side, device=device)], model.to(device))


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
    """All rows of one backbone, dense first, in the order of ``turn_of``. ``save_on_cpu`` is a rival on a device with
    memory of its own only, LoRA one of transformers, and compiled rows are there where there is a C++ compiler."""
    shared: dict = {"backbone": backbone, "precision": precision, "device": device, "batch": batch}
    micro = micro_batch(backbone, precision, Row(label="", **shared).images)
    rows = [
        Row(label="dense", **shared),
        Row(label="checkpointing by block", checkpointing="block", **shared),
        Row(label="checkpointing by stage", checkpointing="stage", **shared),
        Row(label="selective checkpointing by block", checkpointing="selective", **shared),
        Row(label=f"micro-batches of {micro}", micro=micro, **shared),
        Row(label="int8", razor=("int8", 0.0), **shared),
        Row(label="paper 0.9", razor=("paper", 0.9), **shared),
        Row(label="paper 0.97", razor=("paper", 0.97), **shared),
        Row(label="compact 0.9", razor=("compact", 0.9), **shared),
        Row(label="compact 0.95", razor=("compact", 0.95), **shared),
        Row(label="compact 0.97", razor=("compact", 0.97), **shared),
        Row(label="compact 0.9 + checkpointing", razor=("compact", 0.9), checkpointing="block", **shared),
    ]
    if device != "cpu":
        rows.append(Row(label="save_on_cpu", offload=True, **shared))
    if backbone == "vit_b16":
        rows.append(Row(label="LoRA", method="lora", **shared))
        rows.append(Row(label="compact 0.97 + LoRA", razor=("compact", 0.97), method="lora", **shared))
    else:
        rows.append(Row(label="dense, BN trained", bn="train", **shared))
    if has_compiler():
        rows.append(Row(label="compile", compiled=True, **shared))
        rows += [Row(label=f"compile, budget {share:g}", compiled=True, budget=share, **shared) for share in BUDGETS]
        rows.append(Row(label="compile, float8 activations", compiled=True, float8=True, **shared))
        rows.append(Row(label="compact 0.97 + compile", razor=("compact", 0.97), compiled=True, **shared))
    return sorted(rows, key=turn_of)


def turn_of(row: Row) -> int:
    """When a row is measured: the main rows first, then the others that take no compilation, then the compiled ones."""
    if row.compiled:
        return 2
    return 0 if row.label in MAIN else 1
