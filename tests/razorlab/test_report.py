"""The page from records: one file, true to the records, harmless whatever a record holds; commands that fit."""

from __future__ import annotations

import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import TINY, compose_plain

from razorlab import __main__ as razorlab
from razorlab.recall import command_of
from razorlab.records import find_records, read_record, write_record
from razorlab.training.run import execute

RUN = (*TINY, "trainer.steps=1", "trainer.measure.mode=saved")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    for razor in ("none", "compact"):
        execute(compose_plain(*RUN, f"razor={razor}", f"paths.outputs={folder}"))
    return folder


class Page(HTMLParser):
    """Collects every address that the page refers to, and its text; complains of tags that are not closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "action", "data")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def page_of(folder: Path, out: Path) -> str:
    assert razorlab.main(["report", str(folder), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def test_one_file_without_a_network(outputs: Path, tmp_path: Path) -> None:
    text = page_of(outputs, tmp_path / "report.html")
    page = Page(text)
    assert page.open == [] and len(page.addresses) >= 2
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert not re.search(r"@import|url\(|<script|<link|https?:(?!//www\.w3\.org)", text)
    assert "default-src 'none'" in text


def test_figures_and_circumstances_are_those_of_the_records(outputs: Path, tmp_path: Path) -> None:
    words = " ".join(Page(page_of(outputs, tmp_path / "report.html")).words)
    for path in find_records(outputs):
        record = read_record(path)
        assert f"{record['test']['top1']:.2f}" in words and f"{record['memory']['saved_bytes'] / 1e6:.1f}" in words
        assert record["circumstances"]["versions"]["torch"] in words and record["circumstances"]["cpu"] in words
        assert command_of(record) in words
    assert "test_efficientnet on digits" in words and "not measured" in words


def test_a_measured_run_has_a_second_table_and_the_figure_of_its_parts(outputs: Path, tmp_path: Path) -> None:
    title = "What a step holds: weights, gradients, optimizer state and peak"
    assert title not in page_of(outputs, tmp_path / "unmeasured.html")
    for number, path in enumerate(find_records(outputs)):
        record = read_record(path)
        sizes = {
            "weight_bytes": 11e6,
            "gradient_bytes": 12e6,
            "optimizer_bytes": 13e6,
            "peak_bytes": (14 + number) * 1e6,
        }
        record["memory"] |= {**sizes, "total_bytes": sum(sizes.values())}
        (tmp_path / "runs" / str(number)).mkdir(parents=True)
        write_record(tmp_path / "runs" / str(number) / "record.json", record)
    page = Page(page_of(tmp_path / "runs", tmp_path / "report.html"))
    words = " ".join(word.strip() for word in page.words if word.strip())
    assert title in words and "A step holds, MB" in words
    for shown in ("11.0", "12.0", "13.0", "14.0", "15.0", "50.0", "51.0"):
        assert shown in words, shown


def test_markup_in_a_record_stays_text(outputs: Path, tmp_path: Path) -> None:
    record = read_record(find_records(outputs)[0])
    record["circumstances"]["cpu"] = "<script>alert(1)</script>"
    record["config"]["data"]["name"] = "<img src=x onerror=alert(1)>"
    write_record(tmp_path / "record.json", record)
    text = page_of(tmp_path, tmp_path / "report.html")
    assert "<script" not in text and "<img src=x" not in text and "&lt;script&gt;" in text


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("experiment=demo/compact90", "seed=3"),
        ("experiment=table2/pets_paper90", "trainer.batch_size=32", "razor.values=float32"),
        ("model=resnet18", "data=folder", "data.root=my images/it's", "razor=none", "method=bias", "optim=sgd"),
        ("model=timm", "model.name=test_vit", "trainer.micro_batch=4", "data.flip=true", "optim.lr=5e-5"),
    ],
)
def test_a_command_composes_to_the_configuration_it_came_from(overrides: tuple[str, ...]) -> None:
    quoted = [f'data.root="{text[10:]}"' if text.startswith("data.root=") else text for text in overrides]
    config = compose_plain(*quoted)
    names = [text.partition("=")[2] for text in overrides if text.startswith("experiment=")]
    record = {"config": config, "experiment": names[0] if names else None}
    python, script, *arguments = shlex.split(command_of(record))
    assert (python, script) == ("python", "train.py")
    assert compose_plain(*arguments) == config
    assert len(arguments) <= len(overrides)


def test_what_cannot_be_done_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], outputs: Path) -> None:
    assert razorlab.main(["report", str(tmp_path / "absent")]) == 2
    assert razorlab.main(["report", str(tmp_path)]) == 2
    assert razorlab.main(["report", str(outputs), "--out", "/dev/null/report.html"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("razorlab report: ") for line in lines)


def test_the_page_follows_dark_mode_and_wide_tables_scroll_by_themselves(outputs: Path, tmp_path: Path) -> None:
    text = page_of(outputs, tmp_path / "report.html")
    style, body = text.split("</style>")
    names = [set(re.findall(r"(--\w+):", rules)) for rules in style.split("@media (prefers-color-scheme: dark)")]
    assert names[0] == names[1] != set(), "each color has a dark one"
    colors = re.findall(r"(?<![-\w])(?:color|background):\s*([^;]+);", style)
    assert colors and set(colors) <= {f"var({name})" for name in names[0]} | {"#ffffff"}  # white: under a figure
    assert body.count("<table>") == body.count('<div class="scroll" tabindex="0"><table>') > 1
