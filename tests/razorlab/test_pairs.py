"""A backbone and a data set named without an experiment take the paper's recipe for the pair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import compose_plain

from razorlab.commands import profile
from razorlab.composition import options
from razorlab.errors import UserError
from razorlab.help import help_text
from razorlab.pairs import recipe_of, with_recipe
from razorlab.recall import command_of
from razorlab.records import config_hash
from razorlab.released import CNN, DATA, PROXYLESSNAS, TINYTL_COMMANDS, VIT
from razorlab.settings import validate

USERS_OWN = ("model=vit_b16", "data=cifar100", "razor.sparsity=0.9")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], str | None, str | None]]:
    """What train.py hands to the training, checked as there, in place of training."""
    found: list[tuple[dict[str, Any], str | None, str | None]] = []

    def execute(config: dict[str, Any], experiment: str | None, recipe: str | None) -> None:
        validate(config)
        found.append((config, experiment, recipe))

    monkeypatch.setattr("razorlab.training.run.execute", execute)
    return found


def test_the_user_s_own_command_runs_the_paper_s_recipe(command: Callable, runs: list) -> None:
    assert command(*USERS_OWN) == (0, [])
    ((config, experiment, recipe),) = runs
    assert experiment is None and recipe == "vit_b16/cifar100"
    optim, data, trainer, model = (config[name] for name in ("optim", "data", "trainer", "model"))
    assert (optim["name"], optim["lr"], optim["warmup_steps"], optim["grad_clip"]) == ("sgd", 0.01, 500, 1.0)
    assert (optim["momentum"], optim["weight_decay"], optim["label_smoothing"]) == (0.9, 0.0, 0.0)
    assert (trainer["steps"], trainer["batch_size"]) == (20000, 128)
    assert (data["train_transform"], data["crop_scale_min"], data["flip"]) == ("random_crop", 0.05, False)
    assert (data["eval_transform"], data["interpolation"]) == ("squash", "bilinear")
    assert (model["drop_rate"], model["pos_drop_rate"], model["mlp_drop_rate"]) == (0.0, 0.1, 0.1)
    assert (config["razor"]["name"], config["razor"]["sparsity"]) == ("compact", 0.9)


def row_of(model: str, data: str) -> str:
    """The experiment whose settings the pair's are."""
    if model == "vit_b16":
        return f"table2/{data}_compact{round(100 * VIT[data].sparsity)}"
    row = {"proxylessnas": "razor90", "tinytl": "tinytl_lb"}.get(model, f"{model}_razor90")
    return f"table1/{data}_{row}"


@pytest.mark.parametrize("model", ["tinytl", "vit_b16", *CNN])
def test_every_pair_is_what_the_table_s_row_sets(command: Callable, runs: list, model: str) -> None:
    for data in CNN.get(model, DATA):
        assert command(f"model={model}", f"data={data}")[0] == 0
        assert runs[-1][2] == f"{model}/{data}"
        assert config_hash(runs[-1][0]) == config_hash(compose_plain(f"experiment={row_of(model, data)}"))


def test_tinytl_takes_its_own_commands(command: Callable, runs: list) -> None:
    for data, (lr, smoothing) in TINYTL_COMMANDS.items():
        assert command("model=tinytl", f"data={data}")[0] == 0
        optim = runs[-1][0]["optim"]
        assert (optim["name"], optim["lr"], optim["label_smoothing"]) == ("adam", lr, smoothing)
        assert (runs[-1][0]["method"]["name"], runs[-1][0]["razor"]["name"]) == ("tinytl_lb", "none")
    assert command("model=tinytl", "data=pets", "method=bias")[0] == 0
    assert runs[-1][0]["method"]["name"] == "bias"


def test_every_key_and_group_overrides_the_recipe(command: Callable, runs: list) -> None:
    settings = ("optim.lr=0.5", "trainer.steps=7", "model.mlp_drop_rate=0", "method=norm_last", "razor=none")
    assert command("model=vit_b16", "data=cars", *settings)[0] == 0
    config = runs[-1][0]
    assert (config["optim"]["lr"], config["trainer"]["steps"], config["model"]["mlp_drop_rate"]) == (0.5, 7, 0)
    assert (config["razor"]["name"], config["razor"]["sparsity"]) == ("none", 0.0)
    assert command("model=proxylessnas", "data=pets", "method=norm_last", "razor=int8")[0] == 0
    assert runs[-1][0]["method"] == {"name": "norm_last", "bn_affine": "train", "bn_stats": "batch", "frozen_bits": 8}
    assert command("model=vit_b16", "data=cars", "razor=paper")[0] == 0
    assert runs[-1][0]["razor"]["sparsity"] == VIT["cars"].sparsity == 0.8
    assert command("model=vit_b16", "data=cars", "optim=adamw", "optim.lr=1e-4")[0] == 0
    assert (runs[-1][0]["optim"]["name"], runs[-1][0]["optim"]["lr"]) == ("adamw", 1e-4)


def test_recipe_none_is_the_plain_defaults(command: Callable, runs: list) -> None:
    assert command(*USERS_OWN, "recipe=none")[0] == 0
    config, _, recipe = runs[-1]
    assert recipe is None and (config["optim"]["name"], config["optim"]["lr"]) == ("adam", 1e-3)
    assert (config["trainer"]["epochs"], config["trainer"]["steps"], config["razor"]["sparsity"]) == (5, None, 0.9)
    assert command("model=proxylessnas", "data=pets", "recipe=none")[0] == 0
    assert runs[-1][0]["method"] == {"name": "full", "bn_affine": "train", "bn_stats": "batch", "frozen_bits": None}


def test_an_experiment_and_a_pair_without_a_recipe_stay_as_they_are(command: Callable, runs: list) -> None:
    for arguments in (("experiment=demo/dense",), ("model=efficientnet_lite0", "data=digits"), ("model=vit_b16",)):
        assert command(*arguments)[0] == 0
        assert runs[-1][2] is None and runs[-1][0] == compose_plain(*arguments)
    words = ["experiment=table2/cifar100_full", *USERS_OWN]
    assert with_recipe(words) == words


@pytest.mark.parametrize("model", ["../experiment", "a\0b", "", "[vit_b16]"])
def test_what_is_no_name_finds_no_recipe(command: Callable, runs: list, model: str) -> None:
    words = [f"model={model}", "data=cifar100"]
    assert with_recipe(words) == words
    code, lines = command(*words)
    assert len(lines) == (code != 0) and all(recipe is None for *_, recipe in runs)


def test_each_run_of_a_sweep_takes_its_own_recipe(command: Callable, runs: list) -> None:
    assert command("-m", "model=vit_b16,proxylessnas", "data=pets,digits", "seed=1,2")[0] == 0
    found = [(config["model"]["name"], config["data"]["name"], recipe) for config, _, recipe in runs]
    assert len(found) == 8
    for model, data, recipe in found:
        assert recipe == (f"{model}/pets" if data == "pets" else None)
    lr = {recipe: config["optim"]["lr"] for config, _, recipe in runs}
    assert lr["vit_b16/pets"] == 0.001 and lr["proxylessnas/pets"] == PROXYLESSNAS["pets"].lr


def test_another_optimizer_needs_its_own_learning_rate(command: Callable, runs: list) -> None:
    code, lines = command(*USERS_OWN, "optim=adamw")
    assert code == 2 and not runs and len(lines) == 1
    assert "optim=adamw" in lines[0] and "add optim.lr=..., or recipe=none" in lines[0]
    code, lines = command("-m", "model=vit_b16,resnet50", "data=pets", "optim=adamw")
    assert code == 2 and any("vit_b16/pets" in line for line in lines)
    with pytest.raises(UserError):
        with_recipe(["model=proxylessnas", "data=pets", "optim=sgd"])


def test_help_and_cfg_show_what_runs(command: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(options())
    assert "recipe=none takes the plain defaults" in text
    assert "  resnet18 on cifar10, cifar100" in text.splitlines()
    assert any("tinytl or vit_b16 on aircraft, cars" in line for line in text.splitlines())
    for arguments in ((*USERS_OWN, "--cfg", "job"), ("--cfg", "job", *USERS_OWN)):
        assert command(*arguments)[0] == 0
    assert recipe_of(with_recipe(USERS_OWN)) == "vit_b16/cifar100"


def test_the_memory_profile_is_of_the_same_network(monkeypatch: pytest.MonkeyPatch) -> None:
    config = profile.composed(("model=proxylessnas", "data=cars"))
    assert config["method"]["bn_stats"] == PROXYLESSNAS["cars"].bn_stats and config["method"]["frozen_bits"] == 8


@pytest.mark.parametrize(
    "arguments",
    [USERS_OWN, (*USERS_OWN, "recipe=none"), ("model=vit_b16", "data=cars", "razor=none", "optim.lr=1")],
    ids=" ".join,
)
def test_a_record_s_command_makes_the_same_run(command: Callable, runs: list, arguments: tuple[str, ...]) -> None:
    assert command(*arguments)[0] == 0
    config, experiment, recipe = runs[-1]
    shown = command_of({"config": config, "experiment": experiment, "recipe": recipe}).split()[2:]
    assert len(shown) <= len(arguments) + 1
    assert command(*shown)[0] == 0
    assert runs[-1] == runs[0]


def test_the_log_names_the_recipe(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from razorlab.training.run import execute

    caplog.set_level("INFO", logger="razorlab")
    config = compose_plain("recipe=vit_b16/cifar100", "model=vit_b16", "data=cifar100", f"paths.data={tmp_path}")
    with pytest.raises(UserError, match="dataset_setup_scripts/cifar100"):
        execute(config, None, "vit_b16/cifar100")
    assert "recipe vit_b16/cifar100" in caplog.text and "recipe=none" in caplog.text
