"""How tests compare: bits exactly, floats by relative RMS under the tensor's name."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Limits of the relative RMS against an oracle in float64: a few roundings of each type.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def assert_same_bits(name: str, actual: Tensor, expected: Tensor) -> None:
    """Equal to the bit; two NaNs are equal whatever their payload."""
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} instead of {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    actual, expected = actual.detach().contiguous(), expected.detach().contiguous()
    bits = _BITS[actual.element_size()]
    same = actual.view(bits) == expected.view(bits)
    if actual.is_floating_point():
        same |= actual.isnan() & expected.isnan()
    if not bool(same.all()):
        first = int((~same).flatten().nonzero()[0])
        got, wanted = actual.flatten()[first].item(), expected.flatten()[first].item()
        raise AssertionError(
            f"{name}: {int((~same).sum())} of {same.numel()} differ, first at {first}: {got} instead of {wanted}"
        )


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over the RMS of ``expected``, in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def assert_close(name: str, actual: Tensor | None, expected: Tensor, limit: float) -> None:
    """Relative RMS at most ``limit``, which is at most 1e-2; an expected zero tensor has to be met exactly."""
    assert limit <= 1e-2
    assert actual is not None, f"{name} is missing"
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    if not bool(expected.any()):
        assert not bool(actual.any()), f"{name}: expected zeros"
        return
    error = relative_rms(actual, expected)
    assert error <= limit, f"{name}: relative RMS {error:.2e}, above {limit:.0e}"


def gradients_on(model: nn.Module, x: Tensor, device: str) -> dict[str, Tensor]:
    """The gradients of a copy of ``model`` and of its input on ``device``, brought to the CPU; ``x`` stays as it is."""
    moved, leaf = copy.deepcopy(model).to(device), x.to(device, copy=True).requires_grad_()
    out = moved(leaf)
    (out * torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)).sum().backward()
    return {name: p.grad.cpu() for name, p in moved.named_parameters()} | {"input": leaf.grad.cpu()}
