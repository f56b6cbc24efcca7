"""razorlab profile: the layer table, the batch and the sparsity that fit a budget, one-line errors."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import compose_plain

import backrazor as br
from razorlab import __main__ as razorlab
from razorlab.errors import UserError
from razorlab.memory_profile import EXACT_BATCH, StepProfile, layer_table, parse_size
from razorlab.training.network import assemble

ROOT = Path(__file__).resolve().parents[2]
NET = ("model=timm", "model.name=test_efficientnet", "image_size=64", "classes=10")
CONFIG = ("model=timm", "model.name=test_efficientnet", "model.pretrained=false", "method.bn_stats=frozen")


@pytest.fixture(scope="module")
def profile() -> StepProfile:
    return StepProfile(compose_plain(*CONFIG), 10, 64)


def test_the_sums_are_what_the_ledger_finds(profile: StepProfile) -> None:
    lines = layer_table(profile, 4, 0.9, 3).splitlines()
    _, dense, razored, *_ = re.split(r"  +", lines[-1])
    images, labels = torch.randn(4, 3, 64, 64), torch.zeros(4, dtype=torch.long)
    for razor, shown in (("none", dense), ("compact", razored)):
        network = assemble(compose_plain(*CONFIG, f"razor={razor}"), 10)
        with br.memory.ledger(network.model) as ledger:
            loss = torch.nn.functional.cross_entropy(network.model(images), labels)
        assert loss.requires_grad and shown == f"{ledger.total_bytes / 1e6:.3f}"


def test_layers_come_largest_first_and_the_shown_rows_add_up(profile: StepProfile) -> None:
    lines = layer_table(profile, 4, 0.9, 5).splitlines()[2:]
    figures = [[float(text) for text in re.findall(r"\d+\.\d{3}", line)] for line in lines]
    dense = [row[0] for row in figures]
    assert dense[:5] == sorted(dense[:5], reverse=True) and "smaller layers" in lines[5]
    for column in (0, 1):
        assert sum(row[column] for row in figures[:-1]) == pytest.approx(figures[-1][column], abs=0.004)


@pytest.mark.parametrize("sparsity", [None, 0.9])
def test_the_largest_batch_fits_and_the_next_one_does_not(profile: StepProfile, sparsity: float | None) -> None:
    budget = parse_size("budget", "20MB")
    batch = profile.largest_batch(budget, sparsity)
    assert profile.need(batch, sparsity) <= budget < profile.need(batch + 1, sparsity)


def test_a_razored_batch_beyond_the_exact_ones_is_predicted_well(profile: StepProfile) -> None:
    for batch in (3 * EXACT_BATCH // 2, 2 * EXACT_BATCH):
        exact = profile.predict(batch, 0.9).peak_bytes + sum(profile.resident(batch).values())
        assert profile.need(batch, 0.9) == pytest.approx(exact, rel=0.03)


def test_where_blocks_run_some_samples_at_a_time_it_takes_no_more_than_predicted(profile: StepProfile) -> None:
    for batch in (3 * EXACT_BATCH, 4 * EXACT_BATCH):
        exact = profile.predict(batch, 0.9).peak_bytes + sum(profile.resident(batch).values())
        assert profile.need(batch, 0.9) > 0.97 * exact


def test_the_least_sparsity_fits_and_a_hundredth_less_does_not(profile: StepProfile) -> None:
    budget = (profile.need(4, 0.6) + profile.need(4, 0.9)) // 2
    sparsity = profile.least_sparsity(budget, 4)
    assert 0.6 < sparsity < 0.9
    assert profile.need(4, sparsity) <= budget < profile.need(4, round(sparsity - 0.01, 2))


def test_the_command_answers_both_questions(capsys) -> None:
    code = razorlab.main(["profile", *NET, "batch=16", "budget=9.3MB", "razor.sparsity=auto", "rows=2"])
    out = capsys.readouterr().out
    assert code == 0
    assert re.match(r"razor.sparsity=0\.\d+ is the smallest", out) and "saved in all" in out
    assert re.search(r"dense: batch \d+ fits 9.3MB", out) and re.search(r"razored: batch \d+ fits 9.3MB", out)


@pytest.mark.parametrize(("words", "size"), [((), 224), (("image_size=160",), 160), (("data.image_size=96",), 96)])
def test_a_transformer_is_built_for_the_size_that_is_asked_for(words: tuple[str, ...], size: int, capsys) -> None:
    command = ["model=timm", "model.name=vit_tiny_patch16_224", "batch=1", "razor.sparsity=0.9", "rows=1", *words]
    assert razorlab.main(["profile", *command]) == 0
    assert f"{size} px" in capsys.readouterr().out.splitlines()[0]


def test_a_budget_below_one_image_is_said(capsys) -> None:
    assert razorlab.main(["profile", *NET, "budget=1MB", "razor=none", "--batch=2"]) == 0
    assert "dense: nothing fits 1MB, one image needs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("batch=0", "batch=0 is not allowed"),
        ("batch=2.5", "batch=2.5 is not allowed"),
        ("batch", "batch needs a value"),
        ("rows=few", "rows=few"),
        ("image_size=8", "image_size=8"),
        ("budget=24", "budget=24 is not allowed"),
        ("budget=-1GiB", "budget=-1GiB is not allowed"),
        ("budget=nanGiB", "budget=nanGiB is not allowed"),
        ("razor.sparsity=auto", "needs a budget"),
        ("razor.sparsity=2", "razor.sparsity=2"),
        ("razor=int8 razor.sparsity=auto budget=1GiB", "razor=int8"),
        ("budget=1MB razor.sparsity=auto", "is too small"),
        ("model=timm", "model.name must be given"),
        ("model=timm model.name=resnet19", "model.name=resnet19"),
        ("model=timm model.name=crossvit_tiny_240 batch=1", "it is made for 240 px, set data.image_size=240"),
        (
            "model=timm model.name=halonet26t batch=1",
            "(AssertionError): it is made for 256 px, set data.image_size=256",
        ),
        ("trainer.checkpointing=block", "trainer.checkpointing=block is not predicted"),
        ("nosuch=1", "nosuch"),
    ],
)
def test_wrong_values_end_in_one_line_and_code_two(capsys, arguments: str, words: str) -> None:
    given = arguments.split()
    net = () if "model=timm" in given else NET
    assert razorlab.main(["profile", *net, *given]) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and len(lines) == 1 and words in lines[0], lines


def test_the_size_that_the_error_names_is_one_that_works(capsys) -> None:
    net = ["model=timm", "model.name=halonet26t", "batch=1", "rows=1"]
    assert razorlab.main(["profile", *net, "data.image_size=256"]) == 0
    assert "256 px" in capsys.readouterr().out.splitlines()[0]


def test_full_error_shows_the_traceback(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert razorlab.main(["profile", "model=timm", "model.name=halonet26t", "batch=1"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and "halonet26t fails on images of 224 px" in err.splitlines()[-1]


def test_sizes() -> None:
    assert (parse_size("budget", "24GiB"), parse_size("budget", "1.5MB")) == (24 * 2**30, 1_500_000)
    with pytest.raises(UserError, match="above zero"):
        parse_size("budget", "0MB")


def test_a_reader_that_stops_early_is_no_error() -> None:
    """``python -m razorlab profile ... | head``."""
    command = [sys.executable, "-m", "razorlab", "profile", *NET, "batch=1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == -signal.SIGPIPE
