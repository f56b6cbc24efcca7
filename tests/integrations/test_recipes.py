"""The loops of accelerate, timm and torchvision with the lines that the guide adds to them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import backrazor as br

TEXT = (Path(__file__).resolve().parents[2] / "docs/guide/training-loops.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _a_runtime_of_its_own() -> Iterator[None]:
    """accelerate keeps one precision per process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def blocks(section: str) -> list[str]:
    """The Python blocks of a section of the guide."""
    return re.findall(r"```python\n(.*?)```", TEXT.partition(f"## {section}\n")[2].partition("\n## ")[0], re.DOTALL)


def two_lines(section: str, model: nn.Module) -> None:
    """Run what the guide says to add, which is two lines."""
    (block,) = blocks(section)
    assert len(block.strip().splitlines()) == 2
    exec(block, {"model": model})
    assert any(isinstance(module, br.nn.DropIn) for module in model.modules())


def images(count: int = 16, side: int = 32, classes: int = 10) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return TensorDataset(torch.randn(count, 3, side, side, generator=generator), labels)


def small() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Flatten(), nn.Linear(4096, 10)
    return nn.Sequential(*layers)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_accumulates_gradients_as_a_plain_loop_does(precision: str) -> None:
    razored, plain = small(), small()
    (block,) = blocks("accelerate, with gradient accumulation")
    loader = DataLoader(images(), 4)
    names = {"br": br, "F": F, "model": razored, "loader": loader}
    names["Accelerator"] = lambda **options: Accelerator(cpu=True, mixed_precision=precision, **options)
    names["optimizer"] = torch.optim.SGD(razored.parameters(), 0.1)
    exec(block, names)

    br.razor_(plain, br.RazorConfig(sparsity=0.9))
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    for index, (x, y) in enumerate(loader):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = plain(x)
        (F.cross_entropy(output.float(), y) / 2).backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert equal(razored, plain) and not equal(razored, small())


def test_accelerate_finds_a_bad_number_of_any_micro_batch() -> None:
    model = small()
    data = images()
    data.tensors[0][1] = float("inf")  # in the first of two micro-batches
    (block,) = blocks("accelerate, with gradient accumulation")
    names = {"br": br, "F": F, "model": model, "loader": DataLoader(data, 4)}
    names["Accelerator"] = lambda **options: Accelerator(cpu=True, **options)
    names["optimizer"] = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(FloatingPointError, match="NaN or Inf in the input of"):
        exec(block, names)
    assert equal(model, small())


def saved(model: nn.Module, x: Tensor, y: Tensor) -> int:
    with br.memory.ledger(model) as book:
        loss = F.cross_entropy(model(x), y)
    assert loss.isfinite()
    return book.total_bytes


def test_timm_s_train_script() -> None:
    """Its steps with the installed package: model, optimizer, schedule, scaler with clipping, EMA, Mixup, task."""
    from timm import create_model
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3, dispatch_clip_grad

    torch.manual_seed(0)
    model = create_model("efficientnet_lite0", num_classes=10)
    dense, (x, y) = saved(copy.deepcopy(model).train(), *images(4, 64).tensors), images(4, 64).tensors
    two_lines("timm's train script", model)
    assert saved(model.train(), x, y) < dense / 3  # batch norm on batch statistics keeps codes of its input
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    schedule, _ = create_scheduler_v2(optimizer, num_epochs=2, warmup_epochs=1)
    averaged, mixup, loss_fn = ModelEmaV3(model, decay=0.5), Mixup(0.2, 1.0, num_classes=10), SoftTargetCrossEntropy()
    before = copy.deepcopy(model)
    for update in range(2):
        mixed, targets = mixup(x.clone(), y)
        loss_fn(model(mixed), targets).backward()
        br.check_finite(model)
        dispatch_clip_grad(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        averaged.update(model, step=update)
        schedule.step(update + 1)
    assert not equal(model, before)
    with torch.no_grad():
        assert averaged(x).isfinite().all()


def test_timm_s_tasks() -> None:
    from timm import create_model
    from timm.task import ClassificationTask

    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)
    two_lines("timm's train script", model)
    task = ClassificationTask(model, criterion=nn.CrossEntropyLoss())
    x, y = images(4).tensors
    task(x, y)["loss"].backward()
    br.check_finite(model)
    assert all(p.grad is not None for p in model.parameters())


def test_torchvision_s_reference_recipe() -> None:
    """Its steps with the installed package: label smoothing, CutMix or MixUp, averaged weights, autocast, scaler."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
    from torchvision.models import get_model
    from torchvision.transforms import v2

    torch.manual_seed(0)
    model = get_model("mobilenet_v2", num_classes=10)
    x, y = images(4, 64).tensors
    dense = saved(copy.deepcopy(model).train(), x, y)
    two_lines("torchvision's reference recipes", model)
    assert saved(model.train(), x, y) < dense / 3
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True)
    criterion, scaler = nn.CrossEntropyLoss(label_smoothing=0.1), torch.amp.GradScaler("cpu", init_scale=128.0)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    mix = v2.RandomChoice([v2.MixUp(num_classes=10), v2.CutMix(num_classes=10)])
    before = copy.deepcopy(model)
    for _ in range(2):
        mixed, targets = mix(x, y)
        with torch.autocast("cpu", torch.bfloat16):
            loss = criterion(model(mixed), targets)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        br.check_finite(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        averaged.update_parameters(model)
    assert not equal(model, before)
    with torch.no_grad():
        assert averaged.eval()(x).isfinite().all()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own call
def test_the_guide_s_lines_for_lora_transformers_and_lightning_are_python() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import ViTConfig, ViTForImageClassification

    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, num_labels=10, **width))
    names = {"br": br, "model": model, "get_peft_model": get_peft_model, "LoraConfig": LoraConfig}
    exec(blocks("LoRA")[0], names)
    assert any(isinstance(module, br.nn.DropIn) for module in names["model"].modules())
    for section in ("The Trainer of transformers", "Lightning"):
        for block in blocks(section):
            compile(block, section, "exec")
