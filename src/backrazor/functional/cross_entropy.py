"""Cross-entropy of a linear map's output without the output, where the logits are a step's largest tensor: of a Linear,
for vocabularies, and of maps of scores brought to the size of their image, for segmentation.

Logits are made some rows or samples at a time, and their gradient is made beside them and multiplied out at once, as
Liger-Kernel does (Hsu et al., https://arxiv.org/abs/2410.10989). Between forward and backward nothing of the size of
the logits exists: the gradients of x and of the weight do. Shape legend: N rows or samples, D features, V classes, h/w
height/width of x, H/W of the target.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.sealed import sealed
from .common import autocast_dtype, cast_to, needs_grad, sample_chunks
from .transforms import RazorFunction, differentiable_once, one_node

_REDUCTIONS = ("mean", "sum")


@one_node
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """``F.cross_entropy(F.linear(x, weight, bias), target, ...)`` of x (*, D), weight (V, D) and target (*) of class
    indices; a scalar of float32, or float64 of such an x.

    Equal to the two operators up to the order of sums; softmax and sums are at least float32. Gradients are exact.

    Raises:
        ValueError: ``reduction`` is neither "mean" nor "sum", or shapes do not fit.
    """
    _check_reduction(reduction)
    if x.shape[:-1] != target.shape or x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and target {tuple(target.shape)} do not fit: "
            "they are (*, D), (V, D) and (*)"
        )
    settings = ignore_index, label_smoothing, reduction, autocast_dtype(x)
    loss, *_ = _LinearCrossEntropy.run(x, weight, bias, target, needs_grad(x, weight, bias), *settings)
    return loss


@one_node
def upsampled_cross_entropy(
    x: Tensor, target: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0, reduction: str = "mean"
) -> Tensor:
    """``F.cross_entropy(logits, target, ...)`` of logits = ``F.interpolate(x, (H, W), mode="bilinear")`` of x (N, V, h,
    w) and target (N, H, W) of class indices; a scalar of float32, or float64 of such an x.

    Equal to the two operators up to the order of sums; everything is at least float32. The gradient is exact. Logits
    are made some samples at a time.

    Raises:
        ValueError: ``reduction`` is neither "mean" nor "sum", or shapes do not fit.
    """
    _check_reduction(reduction)
    if x.dim() != 4 or target.dim() != 3 or len(x) != len(target):
        raise ValueError(
            f"x {tuple(x.shape)} and target {tuple(target.shape)} do not fit: they are (N, V, h, w) and (N, H, W)"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    settings = ignore_index, label_smoothing, reduction, wide
    loss, *_ = _LinearCrossEntropy.run(x, None, None, target, needs_grad(x), *settings)
    return loss


def _check_reduction(reduction: str) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is not known: use one of {', '.join(_REDUCTIONS)}")


def _loss_shapes(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    keeps: tuple[bool, bool, bool],
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    cast: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    wide = torch.promote_types(cast or x.dtype, torch.float32)
    grads = (
        torch.empty_like(t, dtype=_sum_type(t)) if keep else None
        for t, keep in zip((x, weight, bias), keeps, strict=True)
    )
    return x.new_empty((), dtype=wide), *grads


@sealed(_loss_shapes)
def _loss(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    keeps: tuple[bool, bool, bool],
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    cast: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    """The loss, and its gradients where ``keeps`` asks for them; of maps where there is no weight."""
    rows, labels = (x, target) if weight is None else (x.reshape(-1, x.shape[-1]), target.reshape(-1))
    rows, matrix, offset = cast_to(cast, rows, weight, bias)
    wide = torch.promote_types(rows.dtype, torch.float32)
    counted = labels != ignore_index
    # no gradient where nothing counts, as cross_entropy's mean of nothing is NaN and its gradient zero
    share = 1 / counted.sum().to(wide) if reduction == "mean" else torch.ones((), dtype=wide, device=x.device)
    loss = torch.zeros((), dtype=wide, device=x.device)
    grads = [
        torch.zeros_like(t, dtype=_sum_type(t)) if keep else None
        for t, keep in zip((x, weight, bias), keeps, strict=True)
    ]
    grad_rows = None if grads[0] is None else grads[0].view(rows.shape)
    logits_bytes = wide.itemsize * (x.shape[1] * target.shape[1] * target.shape[2] if weight is None else len(weight))
    for start, stop in sample_chunks(len(rows), logits_bytes, x.device):
        chunk, part = rows[start:stop], labels[start:stop]
        logits = _upsampled(chunk, part) if matrix is None else F.linear(chunk, matrix, offset).to(wide)
        sum_of_losses, slope = _loss_and_slope_(logits, part, counted[start:stop], label_smoothing)
        loss += sum_of_losses
        if not any(keeps):
            continue
        slope = slope.mul_(share.nan_to_num(posinf=0.0)).to(rows.dtype)
        if grad_rows is not None:
            grad_rows[start:stop] = _downsampled(slope, chunk) if matrix is None else slope @ matrix
        if grads[1] is not None:
            _add_product(grads[1], slope, chunk)
        if grads[2] is not None:
            grads[2] += slope.sum(0, dtype=grads[2].dtype)
        del logits, slope
    return loss * share, *grads


class _LinearCrossEntropy(RazorFunction):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        target: Tensor,
        differentiates: bool,
        ignore_index: int,
        label_smoothing: float,
        reduction: str,
        cast: torch.dtype | None,
    ) -> tuple[Tensor, ...]:
        keeps = tuple(differentiates and t is not None and t.requires_grad for t in (x, weight, bias))
        loss, *grads = _loss(x, weight, bias, target, keeps, ignore_index, label_smoothing, reduction, cast)
        return loss, *(g for g in grads if g is not None)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, needs = iter(ctx.saved_tensors), ctx.needs_input_grad
        # nobody reads them again where the graph is not kept, and the weight's would be the largest tensor of a step
        in_place = not torch._C._autograd._get_current_graph_task_keep_graph()
        grads = [
            _scaled(next(kept), grad, in_place).to(dtype) if need else None
            for need, dtype in zip(needs[:3], ctx.dtypes, strict=True)
        ]
        return *grads, *(None for _ in needs[3:])


def _scaled(x: Tensor, factor: Tensor, in_place: bool) -> Tensor:
    return x.mul_(factor) if in_place else x * factor


def _sum_type(x: Tensor) -> torch.dtype:
    """Sums over chunks are at least float32; a row's gradient is made whole, and is small beside them."""
    return torch.promote_types(x.dtype, torch.float32)


def _add_product(total: Tensor, slope: Tensor, rows: Tensor) -> None:
    if total.dtype == slope.dtype:
        total.addmm_(slope.t(), rows)
    else:
        total += slope.t() @ rows


def _upsampled(x: Tensor, target: Tensor) -> Tensor:
    return F.interpolate(x, target.shape[1:], mode="bilinear", align_corners=False)


def _downsampled(slope: Tensor, x: Tensor) -> Tensor:
    """The gradient of x (n, V, h, w) from that of its ``_upsampled`` (n, V, H, W): sides are stretched one by one, so
    it is two matrix products, deterministic on every device."""
    tall, broad = (
        F.interpolate(torch.eye(small, dtype=slope.dtype, device=slope.device)[None], large, mode="linear")[0]
        for small, large in zip(x.shape[2:], slope.shape[2:], strict=True)
    )
    return tall @ (slope @ broad.t())


def _loss_and_slope_(logits: Tensor, labels: Tensor, counted: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The summed loss, and in the place of ``logits`` its gradient: softmax less the target's distribution.

    The log of a row's sum is its largest logit less the log of the largest probability, which is at least 1 / V: so no
    second tensor of the logits' size is made.
    """
    places = torch.where(counted, labels, 0).unsqueeze(1)
    largest, target = logits.amax(1, keepdim=True), logits.gather(1, places)
    if smoothing:
        target = torch.lerp(target, logits.mean(1, keepdim=True), smoothing)
    slope = torch.softmax(logits, 1, out=logits) if not logits.requires_grad else logits.softmax(1)
    losses = largest - slope.amax(1, keepdim=True).log() - target
    slope.scatter_add_(1, places, slope.new_full((), smoothing - 1).expand(places.shape))
    if smoothing:
        slope -= smoothing / logits.shape[1]
    return losses.squeeze(1).where(counted, 0).sum(), slope.mul_(counted.unsqueeze(1))
