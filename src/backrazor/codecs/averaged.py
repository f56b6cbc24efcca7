"""An input kept whole in few bits, averaged over blocks of neighbouring positions.

For what pruning suits badly: the inputs that come from no activation (expansions of inverted residuals, images), whose
elements are neither sparse nor much alike. They are narrow, so few bits suffice, and where maps are large, neighbours
say the same.

Shape legend: B samples, C channels, H/W height/width, h/w that of the averages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.dispatch import on_cuda
from .packed import Form, Packed
from .pruned import Pruned, PrunedForm


@dataclass(frozen=True, slots=True)
class Averaged:
    """``side``: the averages of a map are at most so many in height and in width. ``values``: "int4" or "int8"."""

    side: int
    values: str = "int4"

    def form(self, x: Tensor) -> AveragedForm:
        """How x (B, C, H, W) is going to be stored."""
        block = tuple(max(-(-size // self.side), 1) for size in x.shape[2:])
        sizes = [-(-size // along) for size, along in zip(x.shape[2:], block, strict=True)]
        stored = Pruned(0.0, self.values).form(x.new_empty(()).expand(*x.shape[:2], *sizes))
        return AveragedForm(tuple(x.shape), x.dtype, block, stored)

    def pack(self, x: Tensor, flag: Tensor) -> Packed:
        """Pack x (B, C, H, W)."""
        form = self.form(x)
        return Packed(form.stored.pack(form.averages(x.detach()), flag), form)


@dataclass(frozen=True, slots=True)
class AveragedForm(Form):
    """The averages over ``block`` (height, width), stored as ``stored`` says. x_hat repeats them."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    block: tuple[int, int]
    stored: PrunedForm

    @property
    def count(self) -> int:
        return self.stored.count

    def averages(self, x: Tensor) -> Tensor:
        """(B, C, h, w): the blocks at the right and lower border may be smaller."""
        return x if self.block == (1, 1) else F.avg_pool2d(x, self.block, ceil_mode=True)

    def sums(self, x: Tensor) -> Tensor:
        """The same of sums, the transpose of repeating: float32 for 16 bits."""
        wide = x.float() if x.element_size() == 2 else x
        (b, c, height, width), (down, across) = x.shape, self.block
        if x.is_contiguous() and not on_cuda(x.device) and height % down == 0 and width % across == 0:
            # whole rows are added first: half of the pooling's time
            rows = wide.view(b * c, height // down, down, width).sum(2)
            return rows.view(b, c, height // down, width // across, across).sum(4)
        return F.avg_pool2d(wide, self.block, ceil_mode=True, divisor_override=1)

    def read_averages(self, tensors: tuple[Tensor, ...], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """(stop - start, C, h, w) of ``dtype``."""
        return self.stored.read(tensors, start, stop, dtype)

    def read(self, tensors: tuple[Tensor, ...], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        averages = self.read_averages(tensors, start, stop, dtype)
        if self.block == (1, 1):
            return averages
        height, width = self.shape[2:]
        spread = averages.repeat_interleave(self.block[0], 2)[:, :, :height]
        return spread.repeat_interleave(self.block[1], 3)[..., :width]

    def own_values(self, tensors: tuple[Tensor, ...], x_hat: Tensor, start: int, stop: int) -> Tensor:
        return x_hat.new_tensor((stop - start) * self.stored.sample_numel)
