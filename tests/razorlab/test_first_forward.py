"""The first forward of a network: what it raises is one line, and trying it changes nothing."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY, compose_plain
from torch._dynamo.exc import Unsupported

from razorlab.errors import UserError
from razorlab.training.first_forward import LONGEST, explained, try_forward
from razorlab.training.network import assemble


def test_trying_changes_neither_the_network_nor_the_random_state() -> None:
    config = compose_plain(*TINY, "model.drop_rate=0.5", "razor=compact", "razor.sparsity=0.5")
    network = assemble(config, 5)
    before = {name: value.clone() for name, value in network.model.state_dict().items()}
    modes = [module.training for module in network.model.modules()]
    state = torch.get_rng_state()
    try_forward(network, config)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [module.training for module in network.model.modules()]
    for name, value in network.model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("shapes\n\n  differ"), ["(RuntimeError: shapes differ)", "set data.image_size=160"]),
        (AssertionError(), ["(AssertionError)", "HYDRA_FULL_ERROR=1"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried " + "x" * 999), ["trainer.micro_batch", "razor.sparsity"]),
        (Unsupported("a graph"), ["(Unsupported: a graph", "leave trainer.compile out"]),
        (NotImplementedError("no"), ["(NotImplementedError: no)"]),
        (RuntimeError("InvalidCxxCompiler: No working C++ compiler found"), ["install one, such as g++"]),
    ],
)
def test_any_error_is_one_line_that_names_network_size_and_way_out(error: Exception, words: list[str]) -> None:
    backbone = assemble(compose_plain(*TINY), 5).backbone
    with pytest.raises(UserError) as caught, explained(backbone, "test_efficientnet", 32):
        raise error
    text = str(caught.value)
    assert text.startswith("model.name=test_efficientnet fails on images of 32 px (") and "\n" not in text
    assert len(text) < LONGEST + 250 and caught.value.__cause__ is error
    for word in words:
        assert word in text


def test_errors_that_are_not_the_networks_pass_through() -> None:
    backbone = assemble(compose_plain(*TINY), 5).backbone
    for error in (
        UserError("a file"),
        FloatingPointError("a layer"),
        RuntimeError("DataLoader worker (pid 1) died. x"),
    ):
        with pytest.raises(type(error)) as caught, explained(backbone, "test_efficientnet", 32):
            raise error
        assert caught.value is error


def test_what_training_mode_alone_refuses_is_one_line(command) -> None:
    """A batch of one image with 1 x 1 maps: batch norm on batch statistics has one value per channel."""
    code, lines = command(
        *TINY, "trainer.batch_size=1", "method.bn_stats=batch", "data.train_fraction=0.1", "trainer.steps=1"
    )
    assert code == 2 and "Expected more than 1 value per channel" in lines[-1], lines
    assert lines[-1].startswith("train.py: model.name=test_efficientnet fails on images of 32 px")
