"""Every option of every group composes to the schema's keys, and help and lists name them."""

from __future__ import annotations

from collections import Counter

import pytest
from conftest import compose_plain

from razorlab.commands import train
from razorlab.composition import options
from razorlab.groups import file_names, read_file
from razorlab.help import help_text
from razorlab.keys import REQUIRED
from razorlab.records import config_hash, run_directory
from razorlab.settings import BY_PATH, defaults, flatten, validate

OPTIONS = options()
NEEDS = {
    ("model", "hf"): ("model.name=bert-base-uncased",),
    ("model", "timm"): ("model.name=resnet18.tv_in1k",),
    ("data", "folder"): ("data.root=somewhere",),
}
CASES = [(group, name) for group in OPTIONS if group != "experiment" for name in OPTIONS[group]]


@pytest.mark.parametrize(("group", "name"), CASES, ids=lambda value: value)
def test_every_group_file_composes_to_known_and_valid_keys(group: str, name: str) -> None:
    config = compose_plain(f"{group}={name}", *NEEDS.get((group, name), ()))
    validate(config)
    assert {path for path, _ in flatten(config)} == set(BY_PATH)


@pytest.mark.parametrize("name", OPTIONS["experiment"])
def test_every_experiment_composes(name: str) -> None:
    validate(compose_plain(f"experiment={name}"))


def test_help_names_every_group_option_and_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.strip() == help_text(OPTIONS).strip()
    for path, key in BY_PATH.items():
        assert path in shown and key.help in shown
    for group, names in OPTIONS.items():
        counted = group in ("experiment", "recipe")
        assert group in shown and (counted or all(name in shown for name in names))


def test_cfg_job_prints_the_configuration_without_running(command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--cfg", "job", "razor.sparsity=0.95")[0] == 0


def test_default_razor_is_compact_so_that_sparsity_works_alone() -> None:
    config = compose_plain("model=efficientnet_lite0", "data=digits", "razor.sparsity=0.95")
    assert (config["razor"]["name"], config["razor"]["sparsity"]) == ("compact", 0.95)


def test_two_configurations_never_share_a_folder_and_seeds_have_their_own() -> None:
    first = compose_plain("razor.sparsity=0.9")
    assert config_hash(first) == config_hash(compose_plain("razor.sparsity=0.9", "seed=3", "paths.outputs=elsewhere"))
    for override in ("razor.sparsity=0.91", "optim.lr=0.5", "method.bn_stats=frozen", "trainer.checkpointing=block"):
        assert config_hash(first) != config_hash(compose_plain(override))
    folder = run_directory(first, "table2/row")
    assert folder.parts[:3] == ("outputs", "table2", "row") and folder.parts[3] == "full-compact-0.9"
    assert run_directory(first, None).parts[1] == "efficientnet_lite0-digits" and folder.parts[-1] == "0"


def test_help_counts_the_experiments_of_each_table_and_spells_short_groups() -> None:
    lines = help_text(options()).splitlines()
    assert max(map(len, lines)) < 180
    (line,) = (line for line in lines if line.strip().startswith("experiment "))
    for table, count in Counter(name.partition("/")[0] for name in OPTIONS["experiment"]).items():
        assert f"{table}/ ({count})" in line
    assert "--list experiment" in line
    assert any("compact, int8, none, paper" in line for line in lines)


def test_list_has_a_line_for_each_option(capsys: pytest.CaptureFixture[str]) -> None:
    for group, names in OPTIONS.items():
        assert train.main(["--list", group]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == names
        assert group not in ("experiment", "recipe", "data", "method") or all(len(line.split()) > 2 for line in lines)
    assert train.main(["--list", "nosuch"]) == 2 and "task|model|data" in capsys.readouterr().err


def test_the_schema_holds_what_no_file_sets() -> None:
    """Each default once: a file of a group says what differs, but for groups that lie above a recipe's settings."""
    known = dict(flatten(defaults()))
    for group in ("task", "model", "data", "optim"):
        for name in file_names(group):
            said = {f"{group}.{key}": value for key, value in read_file(f"{group}/{name}").items()}
            assert not [path for path, value in said.items() if known[path] == value != REQUIRED], name
