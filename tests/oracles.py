"""Independent formulas that gradients are held to: plain PyTorch in float64 that knows nothing of how the library
computes.

Lossy operators have one oracle: the vector-Jacobian product of the dense operator at x_hat, what the codec gives back
of the input. Norms and activations keep something else than an input; their formulas stand here.

Shape legend: B samples, C channels, * positions.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp


def vjp_at(dense: nn.Module, x_hat: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Gradients of the plain module ``dense`` at the input ``x_hat``, by parameter name, and "input"."""
    dense = copy.deepcopy(dense).double()
    parameters = {name: parameter.detach() for name, parameter in dense.named_parameters()}

    def forward(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(dense, parameters, (x,))

    _, pull = vjp(forward, parameters, x_hat.detach().double())
    gradients, grad_input = pull(grad.double())
    return {**gradients, "input": grad_input}


def channel_scale_at(x_hat: Tensor, gate: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x * gate for the exact gate: (of x, of the gate at x_hat)."""
    _, pull = vjp(torch.mul, x_hat.double(), gate.detach().double())
    return pull(grad.double())


def clamp_gradient(x: Tensor, low: float, high: float, grad: Tensor) -> Tensor:
    """The derivative is 1 inside (low, high), 0 at and beyond the ends, and 1 at NaN."""
    outside = (x.double() <= low) | (x.double() >= high)
    return grad.double() * ~outside


def activation_gradient(
    function: nn.Module, x: Tensor, kept: str, table: tuple[Tensor, Tensor], grad: Tensor
) -> Tensor:
    """Of a smooth activation.

    "dense": at x; "float16": at x rounded; else grad times the level of x's interval in ``table`` (thresholds, levels).
    """
    if kept in ("dense", "float16"):
        point = (x.half() if kept == "float16" else x).detach().double().requires_grad_()
        return torch.autograd.grad(function(point), point, grad.double())[0]
    thresholds, levels = table
    code = (x.detach().double().unsqueeze(-1) >= thresholds.double()).sum(-1)
    return grad.double() * levels.double()[code]


def normalised(
    x: Tensor, x_hat: Tensor, mean: Tensor, variance: Tensor, eps: float, rule: str, rows: tuple[int, ...]
) -> Tensor:
    """What the backward of a norm reads instead of (x - mean) / sqrt(variance + eps).

    ``mean`` and ``variance`` broadcast to x. "pruned": x_hat in place of x; "bfloat16": x rounded; "int8" and "int4":
    the normalised values of each row (the dimensions ``rows``) as integers times the float16 of their largest magnitude
    / 127 or / 7.
    """
    x, rstd = x.detach().double(), (variance.double() + eps).rsqrt()
    if rule == "pruned":
        return (x_hat.double() - mean.double()) * rstd
    if rule == "bfloat16":
        return (x.bfloat16().double() - mean.double()) * rstd
    z = (x - mean.double()) * rstd
    if rule == "dense":
        return z
    limit = 2 ** (int(rule.removeprefix("int")) - 1) - 1
    scale = (z.abs().amax(rows, keepdim=True) / limit).half().double()
    return (z / scale).round().clamp(-limit, limit) * scale


def frozen_batch_norm_gradient(
    z: Tensor, variance: Tensor, weight: Tensor, eps: float, grad: Tensor
) -> dict[str, Tensor]:
    """y = weight * z + bias on running statistics, z (B, C, *) given."""
    channel, sums = (1, -1, *(1,) * (grad.dim() - 2)), (0, *range(2, grad.dim()))
    grad, scale = grad.double(), weight.detach().double() * (variance.double() + eps).rsqrt()
    return {"input": grad * scale.view(channel), "weight": (grad * z).sum(sums), "bias": grad.sum(sums)}


def batch_norm_gradient(z: Tensor, variance: Tensor, weight: Tensor, eps: float, grad: Tensor) -> dict[str, Tensor]:
    """y = weight * z + bias on batch statistics: the means of grad and of grad * z are taken out.

    Ioffe and Szegedy 2015, section 3.
    """
    channel, sums = (1, -1, *(1,) * (grad.dim() - 2)), (0, *range(2, grad.dim()))
    grad, scale = grad.double(), weight.detach().double() * (variance.double() + eps).rsqrt()
    centred = grad - grad.mean(sums, keepdim=True) - z * (grad * z).mean(sums, keepdim=True)
    return {"input": centred * scale.view(channel), "weight": (grad * z).sum(sums), "bias": grad.sum(sums)}


def layer_norm_gradient(
    z: Tensor,
    variance: Tensor,
    eps: float,
    grad: Tensor,
    weight: Tensor | None,
    affine_shape: tuple[int, ...],
    centred: bool = True,
) -> dict[str, Tensor]:
    """y = weight * z + bias on each row's own statistics: the means of g and of g * z over a row are taken out, with g
    the gradient times ``weight``.

    z and variance are (B, R, m) and (B, R, 1), one per row. grad and weight have y's shape, and ``affine_shape`` is
    that of the affine parameters, broadcast to y. Not ``centred`` leaves the mean of g in. Ba et al. 2016 (rows of
    tokens), Wu and He 2018 (rows of groups), Zhang and Sennrich 2019 (not centred).
    """
    grad = grad.double()
    g = (grad if weight is None else grad * weight).reshape(z.shape)
    rest = g - (g.mean(2, keepdim=True) if centred else 0) - z * (g * z).mean(2, keepdim=True)
    return {
        "input": (rest * (variance + eps).rsqrt()).reshape(grad.shape),
        "weight": (grad * z.reshape(grad.shape)).sum_to_size(affine_shape),
        "bias": grad.sum_to_size(affine_shape),
    }
