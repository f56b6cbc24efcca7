"""The ablations prune forward, or choose at random, in the laboratory alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TINY, compose_plain
from torch import nn

import backrazor as br
from backrazor.codecs import kept_count
from razorlab.errors import UserError
from razorlab.experiments import ABLATION_RULES, ABLATION_SPARSITIES, experiments
from razorlab.records import config_hash
from razorlab.settings import validate
from razorlab.tables.collect import row_label
from razorlab.training.ablation import ablate
from razorlab.training.network import assemble
from razorlab.training.run import execute

SPARSITY = 0.75


def razored(**razor: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5, bias=False))
    br.razor_(model, br.RazorConfig.paper(SPARSITY, values="float32"))
    ablate(model, razor)
    return model


def largest(x: torch.Tensor) -> torch.Tensor:
    """x with the largest magnitudes of each sample kept, written out."""
    rows = x.flatten(1)
    kept = rows.abs().topk(kept_count(rows.shape[1], SPARSITY)).indices
    return (rows * torch.zeros_like(rows).scatter_(1, kept, 1)).view(x.shape)


def test_forward_and_gradients_are_those_of_the_network_of_pruned_inputs() -> None:
    model, x = razored(forward="pruned"), torch.randn(4, 3, 8, 8, requires_grad=True)
    conv, linear = model[0].weight, model[3].weight
    with br.memory.ledger(model) as ledger:
        got = model(x)
    expected = largest(torch.conv2d(largest(x), conv).relu().flatten(1)) @ linear.t()
    assert torch.equal(got, expected)
    assert not torch.equal(got, torch.conv2d(x, conv).relu().flatten(1) @ linear.t())
    target = torch.randn(4, 5)
    for ours, theirs in zip(
        torch.autograd.grad((got * target).sum(), (x, conv, linear)),
        torch.autograd.grad((expected * target).sum(), (x, conv, linear)),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert ledger.total_bytes < x.numel() * 4 + 4 * 8 * 36 * 4


def test_the_way_back_leads_to_the_dense_network() -> None:
    model, x = razored(forward="pruned"), torch.randn(2, 3, 8, 8)
    br.unrazor_(model)
    assert torch.equal(model(x), torch.conv2d(x, model[0].weight).relu().flatten(1) @ model[3].weight.t())


def test_evaluation_prunes_forward_too() -> None:
    model, x = razored(forward="pruned").eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = largest(torch.conv2d(largest(x), model[0].weight).relu().flatten(1)) @ model[3].weight.t()
        assert torch.equal(model(x), expected)


def test_random_selection_keeps_as_many_elsewhere_and_leaves_forward_dense() -> None:
    model, x = razored(selection="random"), torch.randn(3, 3, 8, 8)
    codec = model[0].razor.pruned
    flag = model[0].flag_for(x)
    kept = [(packed.unpack().flatten(1) != 0) for packed in (br.codecs.pack(x, codec, flag) for _ in range(400))]
    count = kept_count(3 * 64, SPARSITY)
    assert all((mask.sum(1) == count).all() for mask in kept)
    share = torch.stack(kept).float().mean(0)  # every place is as likely as any other
    assert (share - count / 192).abs().max() < 6 * (0.25 * 0.75 / 400) ** 0.5
    plain = razored()
    assert torch.equal(model(x), plain(x))
    for one, other in ((model, plain), (model, model)):  # neither the largest, nor the same twice
        first, second = (torch.autograd.grad(m(x).square().sum(), m[0].weight)[0] for m in (one, other))
        assert not torch.allclose(first, second)


def test_random_selection_hides_no_bad_number() -> None:
    model, x = razored(selection="random"), torch.randn(2, 3, 8, 8)
    for index in range(12):
        x.view(-1)[index] = float("nan")
    model(x).sum().backward()
    with pytest.raises(FloatingPointError, match="NaN or Inf in the input of 0"):
        br.check_finite(model)


def test_forward_at_random_is_what_backward_reads() -> None:
    model, x = razored(forward="pruned", selection="random"), torch.randn(2, 3, 8, 8)
    seen = []
    model[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    y = model[0](x)
    (got,) = torch.autograd.grad(y.sum(), model[0].weight)
    weight = model[0].weight.detach().requires_grad_()
    (expected,) = torch.autograd.grad(torch.conv2d(seen[0].detach(), weight).sum(), weight)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert (seen[0].flatten(1) != 0).sum(1).tolist() == [kept_count(192, SPARSITY)] * 2


@pytest.mark.parametrize("asked", ["razor.forward=pruned", "razor.selection=random"])
def test_what_contradicts_an_ablation_is_refused_in_one_line(asked: str) -> None:
    for razor in ("none", "int8"):
        with pytest.raises(UserError, match=f"razor={razor} {asked}"):
            validate(compose_plain(*TINY[1:3], f"razor={razor}", asked))
    guesses = compose_plain(*(text for text in TINY if text != "razor=none"), "razor=paper", "razor.fill=mean", asked)
    with pytest.raises(UserError, match=f"{asked} .* set razor.fill=zero"):
        assemble(guesses, 10)


def test_runs_without_the_keys_keep_their_folders_and_labels_tell() -> None:
    config = compose_plain("razor=paper")
    old = {**config, "razor": {k: v for k, v in config["razor"].items() if k not in ("forward", "selection")}}
    assert config_hash(old) == config_hash(config)
    asked = compose_plain("razor=paper", "razor.forward=pruned", "razor.selection=random")
    assert config_hash(asked) != config_hash(config)
    assert row_label(asked) == "full, paper 0.9 + forward pruned + at random" and row_label(old) == "full, paper 0.9"
    assert row_label(compose_plain("razor=paper", "razor.fill=known")) == "full, paper 0.9 + fill=known"


def test_the_table_crosses_rules_with_sparsities() -> None:
    rows = experiments("ablation")
    assert len(rows) == 1 + len(ABLATION_RULES) * len(ABLATION_SPARSITIES)
    assert len({row.name for row in rows}) == len(rows) and {row.data for row in rows} == {"digits"}


def test_a_run_says_what_was_ablated(tmp_path: Path) -> None:
    common = [text for text in TINY if text != "razor=none"]
    config = compose_plain(
        *common,
        "razor=paper",
        "razor.forward=pruned",
        "trainer.steps=2",
        "data.train_fraction=0.05",
        f"paths.outputs={tmp_path}",
    )
    execute(config)
    (report,) = tmp_path.rglob("razor.txt")
    assert "razor.forward=pruned: " in report.read_text()
