"""A network that cannot take its input ends a run in one line, before anything is written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from razorlab import schema
from razorlab.errors import UserError, one_line
from razorlab.models import Backbone
from razorlab.records import side_of
from razorlab.training.costs import example_inputs
from razorlab.training.full import LESS, is_full
from razorlab.training.network import Network
from razorlab.training.sampling import worker_death

LONGEST = 200  # characters of the network's own words
NO_COMPILER = re.compile("no working c\\+\\+ compiler|InvalidCxxCompiler", re.IGNORECASE)
COMPILERS = "torch._dynamo", "torch._inductor"  # whose errors are none of the network's


@contextmanager
def explained(backbone: Backbone, name: str, size: int) -> Iterator[None]:
    """A context for a network's first forward: what it raises becomes one line.

    Args:
        backbone: the network.
        name: its ``model.name``.
        size: side of its input, pixels.

    Raises:
        UserError: the forward failed; names the network, the input's size, the reason and what to do.
    """
    try:
        yield
    except (UserError, FloatingPointError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and worker_death(error) is not None:
            raise
        words = one_line(error)
        words = words if len(words) <= LONGEST else words[: LONGEST - 3] + "..."
        reason = f"{type(error).__name__}: {words}" if words else type(error).__name__
        raise UserError(
            f"model.name={name} fails on {_inputs(backbone, size)} ({reason}): {_advice(backbone, size, error, words)}"
        ) from error


def _inputs(backbone: Backbone, size: int) -> str:
    return f"images of {size} px" if backbone.vocabulary is None else f"texts of {size} tokens"


def _advice(backbone: Backbone, size: int, error: Exception, words: str) -> str:
    if is_full(error):
        return LESS
    if NO_COMPILER.search(words):
        return "trainer.compile=true needs a C++ compiler: install one, such as g++, or leave trainer.compile out"
    if type(error).__module__.startswith(COMPILERS):
        return "leave trainer.compile out; HYDRA_FULL_ERROR=1 shows where it fails"
    own = backbone.own_size
    if own not in (None, size):
        return f"it is made for {own} px, set data.image_size={own}; HYDRA_FULL_ERROR=1 shows where it fails"
    return "choose another network or data.image_size; HYDRA_FULL_ERROR=1 shows where it fails"


def try_forward(network: Network, config: schema.Config) -> None:
    """Run one image of each size that ``config`` asks for through the network, in evaluation mode.

    Nothing is kept for backward, and neither the network's state nor the random state changes.

    Raises:
        UserError: as ``explained``.
    """
    measure = config["trainer"]["measure"]
    sizes = {side_of(config)}
    if measure["mode"] != "none" and measure["image_size"] is not None:
        sizes.add(measure["image_size"])
    device = next(network.model.parameters()).device
    network.model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for size in sorted(sizes):
                with explained(network.backbone, config["model"]["name"], size):
                    network.model(example_inputs(network, 1, size).to(device))
    finally:
        network.train()
