"""A training step as two CUDA graphs (``trainer.cuda_graph=true``): a step's launches for the price of two.

The first graph holds forward, backward, unscaling and the figures that are logged; the second, clipping and the
optimizer's step. Between them lies the step's one read of the device, so the host decides as it does without graphs
whether the weights change. What a graph holds is operators and addresses, and none of the Python between them:

- The first steps run as they are, on the stream that is captured later. They compile kernels, make constants, flags and
  the optimizer's state, none of which a capture may do. Only steps that the optimizer took count.
- A batch is copied into the memory that was captured. One of another shape runs as it is.
- The learning rate is a number in the optimizer's groups for everybody, and a tensor for the optimizer's step, which
  takes the number before each one. The scale of float16's loss is a tensor anyway.
- Gradients lie in the graphs' memory, where each replay writes them anew.

Resuming needs nothing: a run that goes on warms up and captures again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from backrazor.kernels.dispatch import implementation
from razorlab import schema
from razorlab.errors import UserError, one_line
from razorlab.training.full import is_full

WARM_UP = 3  # steps that the optimizer took: a lazily made state or constant is there after the first


class Halves(Protocol):
    """A step in two pieces of work for the device, neither of which reads it."""

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """Forward and backward; returns the figures."""

    def update(self) -> None:
        """Clipping and the optimizer's step, from the gradients."""


class GraphedStep:
    """``plain`` captured after ``WARM_UP`` updates, then replayed. A ``Halves`` itself.

    Args:
        plain: the step.
        optimizer: whose parameters it trains; a fused one, whose learning rate may be a tensor.
    """

    def __init__(self, plain: Halves, optimizer: torch.optim.Optimizer) -> None:
        self.plain, self.optimizer = plain, optimizer
        self.side, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.rates = [torch.zeros((), device=group["params"][0].device) for group in optimizer.param_groups]
        self.updates = 0
        self.replayed = False  # whether the gradients are the graph's
        self.first: Any = None  # the CUDA graphs of both halves, as soon as they are captured
        self.second: Any = None

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """As ``Halves``. The figures are overwritten by the next call.

        Raises:
            UserError: the work cannot be captured.
        """
        if self.first is None and self.updates >= WARM_UP:
            self._capture_gradients(images, labels)
        self.replayed = self.first is not None and images.shape == self.images.shape
        if not self.replayed:
            with self._aside():
                return self.plain.gradients(images, labels)
        self.images.copy_(images, non_blocking=True)
        self.labels.copy_(labels, non_blocking=True)
        for parameter, gradient in self.gradients_of:  # a step of another shape has put its own there
            parameter.grad = gradient
        self.first.replay()
        return self.figures

    def update(self) -> None:
        """As ``Halves``.

        Raises:
            UserError: the work cannot be captured.
        """
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        if self.replayed and self.second is None:
            with self._rates_on_the_device(capturing=True):
                self.second, _ = self._captured(self.plain.update)
        if self.replayed:
            self.second.replay()
            return
        with self._rates_on_the_device(capturing=False), self._aside():
            self.plain.update()
        self.updates += 1

    def _capture_gradients(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.clone(), labels.clone()
        self.first, self.figures = self._captured(lambda: self.plain.gradients(self.images, self.labels))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.gradients_of = [(p, p.grad) for p in parameters]  # held: the second graph would write over them

    @contextmanager
    def _rates_on_the_device(self, capturing: bool) -> Iterator[None]:
        """The optimizer's learning rates are tensors inside, in the warm-up too, which loads the kernels that take
        such; outside they are numbers. ``capturing``: torch's Adam wants to be told."""
        groups = self.optimizer.param_groups
        before: list[dict[str, Any]] = [
            {key: group[key] for key in ("lr", "capturable") if key in group} for group in groups
        ]
        for group, rate, kept in zip(groups, self.rates, before, strict=True):
            group |= {**kept, "lr": rate} | ({"capturable": True} if capturing and "capturable" in kept else {})
        try:
            yield
        finally:
            for group, kept in zip(groups, before, strict=True):
                group |= kept

    def _captured(self, work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        graph = torch.cuda.CUDAGraph()
        # of this thread alone: the one that pins batches asks CUDA for memory, too
        capture = torch.cuda.graph(graph, pool=self.pool, stream=self.side, capture_error_mode="thread_local")
        try:
            with capture:
                result = work()
        except RuntimeError as error:
            while isinstance(error.__context__, RuntimeError):  # the end of a broken capture raises once more
                error = error.__context__
            if is_full(error):
                raise error from None
            raise UserError(
                f"trainer.cuda_graph=true: the step cannot be captured ({one_line(error)[:200]}): leave "
                "trainer.cuda_graph out; the same command would fail again"
            ) from error
        return graph, result

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Work in it is queued on the side stream, between what is queued before and after it."""
        here = torch.cuda.current_stream()
        self.side.wait_stream(here)
        with torch.cuda.stream(self.side):
            yield
        here.wait_stream(self.side)


def check_graph(config: schema.Config, device: torch.device, processes: int) -> None:
    """Refuse ``trainer.cuda_graph=true`` where a step cannot be captured.

    Raises:
        UserError: on the CPU, with several processes, or without the Triton kernels.
    """
    if not config["trainer"]["cuda_graph"]:
        return
    reason = None
    if device.type != "cuda":
        reason = "there is no CUDA device in use"
    elif processes > 1:
        reason = f"{processes} processes share each batch, and their exchange of gradients is not captured"
    elif config["razor"]["name"] != "none" and implementation("topk", torch.empty(0, device=device)) is None:
        reason = "the kernels in plain PyTorch, which are in use here, wait for the device"
    if reason is not None:
        raise UserError(f"trainer.cuda_graph=true is not possible: {reason}; leave it out")
