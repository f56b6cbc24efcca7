"""CONTRIBUTING.md tells the truth: its files exist, hold their example, and the public interface is typed."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import yaml

import backrazor as br
from backrazor.nn import DROP_INS
from razorlab.data.registry import DATASETS
from razorlab.models.zoo import BACKBONES

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
KINDS = {
    "An operator": "linear",
    "A codec": "rows",
    "A block of convolutions": "EdgeResidual",
    "A backbone": "resnet18",
    "A dataset": "pets",
}
# What stands for the example in a file that does not name it.
WORDS = {
    "src/backrazor/nn/__init__.py": "RazorLinear",
    "src/backrazor/kernels/rowquant/reference.py": "def encode",
    "src/backrazor/kernels/rowquant/ops.py": "row_encode",
    "src/backrazor/kernels/__init__.py": "row_encode",
    "src/backrazor/config.py": "int4",
    "src/razorlab/data/published/__init__.py": "PETS",
    "tests/backrazor/cases.py": "nn.Linear",
    "tests/backrazor/test_rowquant.py": "reference",
    "tests/backrazor/test_refusals.py": '"Linear"',
}


def steps(kind: str) -> list[str]:
    """The file of each numbered step of a section."""
    section = TEXT.partition(f"### {kind}\n")[2].partition("\n#")[0]
    assert f"Example: `{KINDS[kind]}`" in section
    return re.findall(r"^\d+\. `([^`]+)`", section, re.MULTILINE)


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_names_a_file_that_holds_the_example(kind: str) -> None:
    files = steps(kind)
    assert len(files) >= 3
    for name in files:
        content = (ROOT / name).read_text(encoding="utf-8")
        assert WORDS.get(name, KINDS[kind]) in content, f"{name} does not mention {KINDS[kind]}"


def test_every_file_and_folder_that_is_named_exists() -> None:
    named = re.findall(r"`((?:src|tests|configs|pretrain|dataset_setup_scripts|docs)/[\w./]+)`|\]\(([\w./]+)\)", TEXT)
    assert len(named) > 20
    assert [a or b for a, b in named if not (ROOT / (a or b)).exists()] == []


def test_every_backbone_and_dataset_has_the_files_of_its_kind() -> None:
    assert {file.stem for file in (ROOT / "configs/model").glob("*.yaml")} == {*BACKBONES, "timm", "minilm", "hf"}
    assert {file.stem for file in (ROOT / "configs/data").glob("*.yaml")} == set(DATASETS)
    scripts = {file.stem for file in (ROOT / "dataset_setup_scripts").glob("*.py")} - {"_common", "all", "__init__"}
    scripts -= {"photographs"}  # a folder like one's own: data=folder reads it
    assert scripts == set(DATASETS) - {"digits", "folder", "scenes"}  # embedded, or one's own


def test_every_drop_in_is_in_nn() -> None:
    places = {place.partition(".")[::2] for place in DROP_INS.values() if "." in place}
    assert len(places) > 10
    for stem, name in places:
        made = f"def {name[:-2]}(" if name.endswith("()") else f"class {name}("  # or a function that makes the class
        assert made in (ROOT / f"src/backrazor/nn/{stem}.py").read_text(encoding="utf-8"), name


def test_the_public_interface_is_typed_and_documented_and_small() -> None:
    assert len(br.__all__) <= 10 and (ROOT / "src/backrazor/py.typed").is_file()
    public = [getattr(br, name) for name in br.__all__] + [getattr(br.memory, name) for name in br.memory.__all__]
    for thing in public:
        if inspect.isfunction(thing):
            signature = inspect.signature(thing)
            assert signature.return_annotation is not inspect.Signature.empty, thing
            assert all(p.annotation is not p.empty for p in signature.parameters.values()), thing
        if inspect.isfunction(thing) or inspect.isclass(thing):
            assert thing.__doc__, thing


def test_the_citation_is_valid_and_names_the_paper_and_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["preferred-citation"]["year"] == 2022
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert citation["version"] == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_files_that_go_with_the_wheel_s_readme_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = [target for target in re.findall(r"\]\(([\w./]+)\)", readme) if not target.startswith("http")]
    assert linked and all((ROOT / target).exists() for target in linked)
