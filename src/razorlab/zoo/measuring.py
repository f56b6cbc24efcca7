"""What is measured of one network of the zoo."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import backrazor as br

from .cases import Case


@dataclass
class Row:
    """One line of the table; see the module's text."""

    name: str
    network: str
    forward: str = ""
    dense_mb: float = 0.0
    saved_mb: float = 0.0
    ratio: float = 0.0
    cosine: float = 0.0
    norm: float = 0.0
    left_dense: float = 0.0
    largest_dense: str = ""
    replaced: int = 0
    seconds: float = 0.0
    error: str = ""


class _WrittenOut(TorchFunctionMode):
    """``F.scaled_dot_product_attention`` by its formula, as the razored operator computes it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return self._attention(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if enable_gqa and k.shape[-3] != q.shape[-3]:
            k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
        scores = (q * scale) @ k.transpose(-2, -1)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill_(~attn_mask, float("-inf"))
            scores = scores + attn_mask
        p = scores.softmax(-1)
        if dropout_p > 0:
            p = p * F.dropout(torch.ones_like(p), dropout_p, True)
        return p @ v


def _loss(outputs: list[Tensor]) -> Tensor:
    """A scalar whose gradient is neither constant nor tiny, by a random target for each output."""
    generator = torch.Generator().manual_seed(3)
    parts = []
    for x in outputs:
        if not x.requires_grad:
            continue
        target = torch.randn(x.shape, generator=generator)
        parts.append((x.float() * target).sum() / max(x.numel(), 1) ** 0.5 if x.dim() else x.float())
    return torch.stack(parts).sum()


def start_afresh(model: nn.Module) -> None:
    """What every step that is compared starts from: the same random numbers and statistics, and no gradients."""
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    for module in model.modules():  # statistics move in training: every run starts from the same
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()


def gradients_after(outputs: list[Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The gradients that the loss of ``outputs`` gives the parameters, by name."""
    _loss(outputs).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _run(model: nn.Module, run: Callable[[nn.Module], list[Tensor]], formula: bool) -> tuple:
    """(outputs, gradients, saved bytes, rows) of one training step under fixed random numbers."""
    start_afresh(model)
    with br.memory.ledger(model) as book:
        if formula:
            with _WrittenOut():
                outputs = run(model)
        else:
            outputs = run(model)
    rows = book.rows
    gradients = gradients_after(outputs, model)
    return [x.detach() for x in outputs], gradients, sum(row.bytes for row in rows), rows


def _compared(dense: dict[str, Tensor], razored: dict[str, Tensor]) -> tuple[float, float]:
    product = ours = theirs = 0.0
    for name, g in dense.items():
        if not g.isfinite().all():  # as some networks have with random weights
            continue
        h = razored.get(name)
        h = torch.zeros_like(g) if h is None else h
        product += float((g.double() * h.double()).sum())
        theirs += float(g.double().square().sum())
        ours += float(h.double().square().sum())
    scale = (ours * theirs) ** 0.5
    return (product / scale if scale else float("nan")), (ours / theirs) ** 0.5 if theirs else float("nan")


def measure(case: Case, config: br.RazorConfig) -> Row:
    """Run one case."""
    row, start = Row(case.name, case.network), time.perf_counter()
    try:
        torch.manual_seed(0)
        model, run = case.make()
        model.train()
        plain, gradients, dense, _ = _run(model, run, formula=False)
        written, *_ = _run(model, run, formula=True)
        row.replaced = len(br.razor_(model, config).replaced)
        outputs, razored, saved, rows = _run(model, run, formula=False)
        row.forward = difference_of(plain, outputs)
        if row.forward != "bits" and difference_of(written, outputs) == "bits":
            row.forward = "formula"
        row.dense_mb, row.saved_mb, row.ratio = dense / 1e6, saved / 1e6, dense / max(saved, 1)
        row.cosine, row.norm = _compared(gradients, razored)
        left = [r for r in rows if r.role == "dense"]
        row.left_dense = sum(r.bytes for r in left) / max(saved, 1)
        top = sorted(left, key=lambda r: -r.bytes)[:2]
        row.largest_dense = "; ".join(f"{r.module or 'model'} {r.bytes / saved:.0%} {r.reason}" for r in top)
        if os.environ.get("ZOO_LEDGER"):
            _print_ledger(rows, saved)
    except Exception as error:
        row.error = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:200]
    row.seconds = time.perf_counter() - start
    return row


def _print_ledger(rows: list[Any], saved: int) -> None:
    """What is saved, with layers of one kind together."""
    totals: dict[tuple[str, str, str], int] = {}
    for r in rows:
        key = re.sub(r"\d+", "*", r.module), r.role, r.reason
        totals[key] = totals.get(key, 0) + r.bytes
    for (module, role, reason), size in sorted(totals.items(), key=lambda item: -item[1])[:25]:
        print(f"    {size / saved:6.1%}  {module or 'model':50} {role:14} {reason}")


def difference_of(expected: list[Tensor], got: list[Tensor]) -> str:
    if len(expected) != len(got):
        return f"{len(got)} outputs for {len(expected)}"
    if all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)):
        return "bits"
    worst = max(
        float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
        for a, b in zip(expected, got, strict=True)
        if a.numel()
    )
    return f"{worst:.0e}"
