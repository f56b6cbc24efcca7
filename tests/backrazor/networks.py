"""Small networks that hold one of everything, and factories of training steps for other processes."""

from __future__ import annotations

import os
import signal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import backrazor as br


class Attention(nn.Module):
    """Three Linears that consume one input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1)
        return self.out(weights @ self.v(x))


def mlp(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)
    )


def convnet(inplace: bool = False, dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(inplace=inplace),
        nn.Conv2d(8, 8, 3, padding="same", groups=8),
        nn.BatchNorm2d(8),
        nn.Hardswish(inplace=inplace),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 1),
        nn.SiLU(inplace=inplace),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(12, 5),
    )


def freeze_norms(model: nn.Module) -> nn.Module:
    """Every BatchNorm on running statistics with a frozen affine."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval().requires_grad_(False)
    return model


def wide_net() -> nn.Module:
    """Activations far larger than weights."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 8, 1)
    )


def efficientnet_step(sparsity: float | None, batch: int = 8, side: int = 224) -> br.memory.Step:
    """A step of efficientnet_lite0 with frozen norms; dense where ``sparsity`` is None."""
    import timm

    torch.manual_seed(0)
    model = freeze_norms(timm.create_model("efficientnet_lite0", num_classes=10).train())
    if sparsity is not None:
        br.razor_(model, br.RazorConfig(sparsity))
    x, y = torch.randn(batch, 3, side, side), torch.arange(batch) % 10
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    return br.memory.Step(model, lambda: F.cross_entropy(model(x), y), optimizer)


def failing_step() -> br.memory.Step:
    """Fails in its forward."""
    model = nn.Linear(2, 2)
    return br.memory.Step(model, lambda: model(torch.randn(1, 3)).sum())


def die() -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return torch.zeros(())


def dying_step() -> br.memory.Step:
    """What the kernel does to a process when memory runs out."""
    return br.memory.Step(mlp(), die)


def small_step() -> br.memory.Step:
    model = mlp()
    x = torch.randn(64, 20)
    return br.memory.Step(model, lambda: model(x).square().mean(), torch.optim.SGD(model.parameters(), 0.1))


def growth_and_ledger(razored: bool) -> tuple[int, int]:
    """(growth of resident memory by a forward pass, ledger.total_bytes), for a batch large enough to see."""
    from backrazor.memory.meters import reset_high_water_mark, resident_bytes

    torch.set_num_threads(1)
    model, x = wide_net(), torch.randn(48, 3, 112, 112)
    if razored:
        br.razor_(model, br.RazorConfig(0.5))
    loss = model(x).mean()  # compiles kernels, loads libraries
    loss.backward()
    del loss
    reset_high_water_mark()
    before = resident_bytes()
    with br.memory.ledger(model) as book:
        loss = model(x).mean()  # noqa: F841 (holds the graph while it is measured)
    reset_high_water_mark()
    return resident_bytes() - before, book.total_bytes


def prediction_growth() -> tuple[int, int]:
    """(growth of the resident high-water mark by ``predict``, the bytes it predicts)."""
    from backrazor.memory.meters import high_water_mark, reset_high_water_mark

    model = wide_net()
    br.razor_(model, br.RazorConfig(0.5))
    br.memory.predict(model, (3, 16, 16), 1)  # imports, tables
    before = reset_high_water_mark()
    saved = br.memory.predict(model, (3, 224, 224), 64).saved_bytes
    return high_water_mark() - before, saved
