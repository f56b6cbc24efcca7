"""What ``torch.compile`` makes of one network of the zoo, dense and razored.

The backend is aot_eager: what is traced, how autograd is derived from it and what is kept between forward and backward
are those of any backend, and PyTorch's own kernels run the graphs. Inductor would write code for each network first,
which takes minutes, and none of what is measured here depends on it.
"""

from __future__ import annotations

import logging
import multiprocessing
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

import backrazor as br

from .cases import Case
from .measuring import difference_of, gradients_after, start_afresh

ROUNDING = 1e-5  # of the norm of all gradients: what counts as equal
MORE_BYTES = 1.02  # compiled / eager: what counts as no more

Run = Callable[[nn.Module], list[Tensor]]


@dataclass
class CompiledRow:
    """One line of the table; see the command's text."""

    name: str
    network: str
    dense_graphs: int = 0
    dense_breaks: int = 0
    dense_again: int = 0
    dense_difference: float = float("nan")
    dense_eager_mb: float = 0.0
    dense_mb: float = 0.0
    graphs: int = 0
    breaks: int = 0
    again: int = 0
    forward: str = ""
    cosine: float = float("nan")
    difference: float = float("nan")
    eager_mb: float = 0.0
    compiled_mb: float = 0.0
    reasons: str = ""
    seconds: float = 0.0
    dense_error: str = ""
    error: str = ""


@dataclass
class _Step:
    """One training step: its outputs, gradients, and the bytes that autograd holds before backward."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    saved: int


@dataclass
class _Compiled:
    """A compiled training step, and what compiling it took; ``again``: graphs of a second step."""

    step: _Step
    graphs: int
    breaks: Counter[str]
    again: int


def _beside_hooks(outputs: list[Tensor]) -> list[Tensor]:
    """What nodes of compiled graphs hold as attributes, which no hook is told."""
    found, nodes, seen = [], [x.grad_fn for x in outputs], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += [x for x in getattr(node, "_tensors_no_vc_check", None) or () if isinstance(x, Tensor)]
        nodes += [following for following, _ in node.next_functions]
    return found


def _step(model: nn.Module, called: Any, run: Run) -> _Step:
    """One step of ``model`` by calling ``called``, which is the model or what was compiled of it."""
    start_afresh(model)
    held: dict[int, Tensor] = {}

    def note(x: Tensor) -> Tensor:
        x = x.detach() if x.grad_fn is not None else x  # a node that held its own output would be a cycle
        held[x.untyped_storage()._cdata] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        outputs = run(called)
    held.update({x.untyped_storage()._cdata: x for x in _beside_hooks(outputs)})
    alive = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    saved = sum(x.untyped_storage().nbytes() for key, x in held.items() if key not in alive)
    held.clear()
    gradients = gradients_after(outputs, model)
    return _Step([x.detach() for x in outputs], gradients, saved)


def _compiled(model: nn.Module, run: Run) -> _Compiled:
    torch._dynamo.reset()
    counters.clear()
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Any], **settings: Any) -> Callable:
        nonlocal graphs
        graphs += 1
        return aot_eager(graph, inputs, **settings)

    called = torch.compile(model, backend=backend)
    step = _step(model, called, run)
    first, breaks = graphs, Counter(counters["graph_break"])
    _step(model, called, run)
    return _Compiled(step, first, breaks, graphs - first)


def compared(wanted: dict[str, Tensor], got: dict[str, Tensor]) -> tuple[float, float]:
    """Cosine of all gradients taken as one vector, and the norm of the difference relative to the wanted norm.

    Raises:
        ValueError: one of them has gradients of other parameters.
    """
    if wanted.keys() != got.keys():
        names = sorted(wanted.keys() ^ got.keys())
        raise ValueError(f"{len(names)} gradients exist only with or only without the compiler, such as {names[0]}")
    product = ours = theirs = apart = 0.0
    for name, g in wanted.items():
        h = got[name]
        if not g.isfinite().all():  # as some networks have with random weights
            continue
        g, h = g.double(), h.double()
        product += float((g * h).sum())
        theirs += float(g.square().sum())
        ours += float(h.square().sum())
        apart += float((g - h).square().sum())
    nothing = float("nan")
    cosine = product / (ours * theirs) ** 0.5 if ours * theirs else nothing
    return cosine, (apart / theirs) ** 0.5 if theirs else nothing


def _in_a_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def _short(error: BaseException) -> str:
    return _in_a_line(f"{type(error).__name__}: {error}")[:300]


def measure_here(case: Case, config: br.RazorConfig, report: Callable[[CompiledRow], None]) -> None:
    """Measure one case in this process; ``report`` gets the row as far as it is known after every part."""
    row, start = CompiledRow(case.name, case.network), time.perf_counter()

    def tell() -> None:
        row.seconds = time.perf_counter() - start
        report(replace(row))

    dense_breaks: Counter[str] = Counter()
    try:
        torch.manual_seed(0)
        model, run = case.make()
        model.train()
        eager = _step(model, model, run)
        row.dense_eager_mb = eager.saved / 1e6
        try:
            found = _compiled(model, run)
            dense_breaks = found.breaks
            row.dense_graphs, row.dense_breaks, row.dense_again = found.graphs, found.breaks.total(), found.again
            row.dense_mb = found.step.saved / 1e6
            row.dense_difference = compared(eager.gradients, found.step.gradients)[1]
            del found
        except Exception as error:
            row.dense_error = _short(error)
        tell()
        br.razor_(model, config)
        eager = _step(model, model, run)
        row.eager_mb = eager.saved / 1e6
        tell()
        found = _compiled(model, run)
        row.graphs, row.breaks, row.again = found.graphs, found.breaks.total(), found.again
        more = found.breaks - dense_breaks if row.breaks > row.dense_breaks else Counter()
        row.reasons = "; ".join(f"{count} {_in_a_line(why)[:160]}" for why, count in more.most_common(3))
        row.compiled_mb = found.step.saved / 1e6
        row.forward = difference_of(eager.outputs, found.step.outputs)
        row.cosine, row.difference = compared(eager.gradients, found.step.gradients)
    except Exception as error:
        row.error = _short(error)
    tell()


def _child(case: Case, config: br.RazorConfig, pipe: Connection) -> None:
    logging.disable()  # what Dynamo gives up is in the row
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with closing(pipe):
        measure_here(case, config, pipe.send)


def measure_compiled(case: Case, config: br.RazorConfig, limit: float) -> CompiledRow:
    """Measure one case in a process of its own, forked from this one, which has compiled nothing.

    Args:
        limit: seconds after which the process is ended; the row says so.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(case, config, theirs), daemon=True)
    row, start = CompiledRow(case.name, case.network), time.monotonic()
    process.start()
    theirs.close()
    try:
        while ours.poll(max(limit - (time.monotonic() - start), 0)):
            row = ours.recv()
        process.kill()
        row.error, row.seconds = f"no end after {limit:.0f} s", time.monotonic() - start
    except EOFError:  # it has ended
        process.join()
        if process.exitcode:
            row.error, row.seconds = f"the process died with code {process.exitcode}", time.monotonic() - start
    process.join()
    ours.close()
    return row
