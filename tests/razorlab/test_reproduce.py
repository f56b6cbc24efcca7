"""The tables of the paper as commands: what they need, what is missing, what goes on after an interruption."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import TINY, compose_plain

import backrazor as br
from backrazor.memory.peak import WARM_UP_STEPS
from razorlab import __main__ as razorlab
from razorlab import reproduction
from razorlab.commands import reproduce, table3, train
from razorlab.recipes import DATA, MICRO_BATCH, TABLE2_ROWS, TINYTL, recipes
from razorlab.tables import cells, load_runs, pivot, to_latex
from razorlab.tables.collect import row_label
from razorlab.tables.figures import pareto_front
from razorlab.training.costs import build_step, step_shape
from razorlab.training.network import assemble

TINY_RUN = (*(s for s in TINY if not s.startswith(("razor=", "model"))), "trainer.steps=1", "data.test_fraction=0.1")


def test_every_row_and_data_set_is_there_with_its_published_figure() -> None:
    first = {recipe.name: recipe for recipe in recipes("table1")}
    others = 2 * 3 + 8 * 2 * 2  # ResNet-18, MobileNetV2 and ResNet-50
    assert len(first) == 8 * 9 + others and len(recipes("table2")) == len(TABLE2_ROWS) * 9
    for data in DATA:
        assert first[f"table1/{data}_tinytl_lb"].published is TINYTL["TinyTL-L+B"]
        assert first[f"table1/{data}_razor90"].published is None
    assert "published: 85.0%, 37 MB by formula" in first["table1/cars_tinytl_lb"].about
    assert "not published here" in first["table1/cars_razor90"].about


def test_every_experiment_says_where_its_settings_come_from() -> None:
    """The released commands are those of the rows that prune, but for two data sets' dense ones."""
    text = {recipe.name: recipe.about for table in ("table1", "table2") for recipe in recipes(table)}
    released = {name for name, lines in text.items() if "settings: the released command" in lines}
    for data in DATA:
        razored = {f"table1/{data}_razor90", f"table1/{data}_paper90"}
        assert released >= razored if data != "flowers" else not released & razored
    dense = {"table1/flowers_full", "table1/cifar10_resnet18_full", "table1/cifar100_resnet18_full"}
    assert {name for name in released if name.endswith("_full")} == dense
    assert "extrapolated" in text["table1/flowers_razor90"] and "extrapolated" in text["table1/flowers_paper90"]
    assert "TinyTL's released L+B command" in text["table1/pets_tinytl_l"]
    assert "settings: ours: no command" in text["table1/pets_mobilenetv2_razor90"]
    assert "settings: not released" in text["table1/pets_full"] and "settings: ours" in text["table1/digits_full"]


def test_the_released_rows_of_flowers_and_resnet18_are_to_the_letter() -> None:
    found = {}
    for name in ("flowers_full", "cifar10_resnet18_full", "cifar10_resnet18_razor90", "cifar100_resnet18_full"):
        config = compose_plain(f"experiment=table1/{name}")
        method = config["method"]
        found[name] = config["optim"]["lr"], method["bn_affine"], method["bn_stats"], method["frozen_bits"]
    assert found == {
        "flowers_full": (1e-4, "train", "batch", 8),
        "cifar10_resnet18_full": (3e-5, "train", "batch", None),
        "cifar10_resnet18_razor90": (1e-5, "frozen", "frozen", None),
        "cifar100_resnet18_full": (3e-5, "frozen", "frozen", None),
    }
    rates = [compose_plain(f"experiment=table1/cars_{row}")["optim"]["lr"] for row in ("razor90", "resnet50_razor90")]
    assert rates == [3e-4, 1e-4]
    assert compose_plain("experiment=table1/pets_paper90")["model"]["head_init"] == "uniform"
    assert br.RazorConfig.paper(0.9).batch_norm == "dense"


@pytest.mark.slow
def test_micro_batches_peak_where_compact_does() -> None:
    """``MICRO_BATCH`` is the largest dense micro-batch of ViT-B/16 that peaks no higher than compact's batch of 128."""
    shape = {"input_size": (3, 224, 224)}
    for data, sparsity in (("flowers", 0.8), ("cifar100", 0.9)):
        rows = ("full_micro", f"compact{round(100 * sparsity)}")
        composed = [compose_plain(f"experiment=table2/{data}_{row}", "model.pretrained=false") for row in rows]
        dense, compact = (assemble(config, 100).model for config in composed)
        budget = br.memory.predict(compact, batch_size=128, **shape).peak_bytes
        micro = composed[0]["trainer"]["micro_batch"]
        peaks = [br.memory.predict(dense, batch_size=size, **shape).peak_bytes for size in (micro, micro + 1)]
        assert micro == MICRO_BATCH[sparsity] and peaks[0] <= budget < peaks[1], (sparsity, budget, peaks)


def test_a_measured_step_in_micro_batches_has_the_gradients_of_the_whole() -> None:
    gradients = []
    for micro in ("null", "3"):
        config = compose_plain(*TINY, "method.bn_stats=frozen", f"trainer.micro_batch={micro}")
        step = build_step(config, 10, 8, 32)
        step.forward().backward()
        gradients.append([p.grad for p in step.model.parameters() if p.requires_grad])
    for whole, parts in zip(*gradients, strict=True):
        assert torch.allclose(whole, parts, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_what_is_missing_comes_first_with_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["table1", "--data", "pets", "--seeds", "0", f"paths.data={tmp_path}", f"paths.pretrain={tmp_path}"]
    small = ["data.image_size=32", "trainer.batch_size=2", "trainer.threads=1"]
    assert razorlab.main(["reproduce", *settings, *small, "--outputs", str(tmp_path), "--dry"]) == 0
    shown = capsys.readouterr().out
    assert "missing: data pets" in shown and "dataset_setup_scripts/pets.py" in shown
    assert "pretrain/fetch.py proxylessnas" in shown and "cells: 12 (0 finished, 12 to run)" in shown
    assert "estimate" in shown and not list(tmp_path.rglob("record.json"))
    assert razorlab.main(["reproduce", *settings, *small, "--outputs", str(tmp_path)]) == 2
    assert "--data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["table1", "--data", "nosuch"], "--data=nosuch"),
        (["table1", "--seeds", "x"], "--seeds=x"),
        (["table2", "--data", "pets", "optim.lr=-1"], "optim.lr=-1"),
        (["table2", "--data", "pets", "nosuch.key=1"], "nosuch"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert razorlab.main(["reproduce", *arguments, "--dry"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and word in lines[0]


def test_a_sweep_that_was_interrupted_goes_on_with_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = [recipe for recipe in recipes("table2") if recipe.name in ("table2/digits_last", "table2/digits_compact90")]
    monkeypatch.setattr(reproduce, "experiments", lambda table: two)
    commands: list[list[str]] = []

    def run_here(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=train.main(command[4:]))

    monkeypatch.setattr(reproduce, "subprocess", SimpleNamespace(run=run_here))
    settings = ["table2", "--preset", "smoke", "--outputs", str(tmp_path), "model.name=test_vit.r160_in1k"]
    settings += TINY_RUN
    assert razorlab.main(["reproduce", *settings]) == 0
    assert "cells: 2 (0 finished, 2 to run)" in capsys.readouterr().out
    gone = next((tmp_path / "table2/digits_last").rglob("record.json"))
    kept = next((tmp_path / "table2/digits_compact90").rglob("record.json"))
    stamp = kept.stat().st_mtime_ns
    gone.unlink()
    assert razorlab.main(["reproduce", *settings]) == 0
    shown = capsys.readouterr().out
    assert (
        "cells: 2 (1 finished, 1 to run)" in shown and "Table 2: test_vit.r160_in1k (random weights) on digits" in shown
    )
    assert gone.is_file() and kept.stat().st_mtime_ns == stamp
    assert "experiment=table2/digits_last" in commands[1]
    assert razorlab.main(["reproduce", *settings]) == 0 and len(commands) == 2, "a finished table is only written"
    folder = tmp_path / "table2" / "tables"
    assert {path.name for path in folder.iterdir()} == {"table.csv", "table.md", "table.tex"}
    assert len(pd.read_csv(folder / "table.csv")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_sweep_runs_under_every_launcher(launcher: str, tmp_path: Path) -> None:
    pytest.importorskip({"joblib": "joblib", "submitit_local": "submitit"}[launcher])
    options = {"joblib": ["hydra.launcher.n_jobs=2"], "submitit_local": ["hydra.launcher.timeout_min=5"]}[launcher]
    settings = [*TINY, "trainer.steps=1", "trainer.batch_size=100", f"paths.outputs={tmp_path}/outputs"]
    command = [sys.executable, "train.py", "-m", f"hydra/launcher={launcher}", *options, "seed=1,2", *settings]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in (tmp_path / "outputs").rglob("record.json")]
    assert sorted(record["seed"] for record in records) == [1, 2]
    assert {record["steps"] for record in records} == {1}
    if launcher == "joblib":
        for words in ("run folder", "epoch 1/1", "test accuracy"):
            said = [line for line in done.stderr.splitlines() if words in line]
            assert sorted(line[:4] for line in said) == ["[0] ", "[1] "], done.stderr


def record_of(recipe, accuracy: float, seed: int, peak: float | None) -> dict:
    return {
        "experiment": recipe.name,
        "config_hash": recipe.name,
        "seed": seed,
        "steps": 5,
        "circumstances": {"date": "2026-01-01T00:00:00+00:00"},
        "config": {
            "model": {"name": "net", "pretrained": True},
            "data": {"name": recipe.data, "image_size": 224, "protocol": "official"},
            "method": {"name": "full"},
            "razor": {"name": "none", "sparsity": 0.0},
            "trainer": {"checkpointing": "none", "batch_size": 8},
        },
        "test": {"top1": accuracy, "top5": 100.0},
        "val": {"top1": accuracy},
        "memory": {"batch_size": 8, "image_size": 224, "saved_bytes": 1e6, "peak_bytes": peak},
        "schema": 1,
    }


def test_published_stands_beside_measured_and_a_cell_not_run_says_so(tmp_path: Path) -> None:
    chosen = [recipe for recipe in recipes("table1") if recipe.data in ("pets", "cars")]
    run = next(recipe for recipe in chosen if recipe.name == "table1/pets_full")
    for seed, accuracy in enumerate((90.0, 92.0)):
        path = tmp_path / str(seed) / "record.json"
        path.parent.mkdir()
        record = record_of(run, accuracy, seed, 2e6 if seed == 0 else None)
        if seed == 0:
            record["memory"] |= {
                "weight_bytes": 3e6,
                "gradient_bytes": 4e6,
                "optimizer_bytes": 5e6,
                "total_bytes": 14e6,
            }
        path.write_text(json.dumps(record))
    runs = load_runs(tmp_path)
    table = cells(runs, chosen)
    full = table.set_index("experiment").loc["table1/pets_full"]
    assert full["accuracy"] == 91 and full["accuracy_std"] == pytest.approx(2**0.5) and full["peak_mb"] == 2
    assert full["published_accuracy"] == 93.0 and full["published_formula_mb"] == 391
    text = pivot(table).set_index("Method")
    assert text.loc["full, dense", "pets, %"] == "91.00 ± 1.41" and text.loc["full, dense", "cars, %"] == "not run"
    assert text.loc["full, dense", "pets published, %"] == "93.0"
    assert text.loc["full, Back Razor (compact)", "pets published, %"] == "not published"
    held = ("weights", "gradients", "optimizer state", "measured peak", "in all")
    assert [text.loc["full, dense", f"{name}, MB"] for name in held] == ["3.0", "4.0", "5.0", "2.0", "14.0"]
    assert [text.loc["head alone", f"{name}, MB"] for name in held] == ["not run"] * 5
    both = [recipe for recipe in recipes("table1") if recipe.data in ("pets", "cifar100")]
    gaps = pivot(cells(runs, both)).set_index("Method").loc["full, dense (ResNet-18)"]
    assert (gaps["pets, %"], gaps["pets published, %"], gaps["cifar100, %"]) == ("no recipe", "no recipe", "not run")
    latex = to_latex(pivot(table), "a caption of 50%")
    assert r"\toprule" in latex and r"91.00 $\pm$ 1.41" in latex and r"50\%" in latex


def test_the_pareto_front_holds_what_nothing_beats() -> None:
    points = pd.DataFrame({"peak_mb": [10.0, 20.0, 20.0, 30.0, 40.0], "accuracy": [80.0, 85.0, 90.0, 90.0, 95.0]})
    assert list(pareto_front(points).index) == [0, 2, 4]


@pytest.mark.slow
def test_table_3_goes_on_and_fills_every_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(table3, "SMOKE", {"models": ("resnet18",), "sparsities": (0.0, 0.9), "image_size": 32})
    settings = ["--preset", "smoke", "--outputs", str(tmp_path)]
    assert razorlab.main(["table3", *settings, "--no-peak", "--minutes", "1e-9"]) == 0
    assert len(list(tmp_path.glob("resnet18*.json"))) == 1
    assert razorlab.main(["table3", *settings, "--no-peak"]) == 0
    shown = capsys.readouterr().out
    assert "cells: 5 (1 finished, 4 to run)" in shown and "not measured" in shown
    table = pd.read_csv(tmp_path / "tables" / "table.csv")
    assert len(table) == 5 and table["peak_mb"].isna().all()
    assert (table["saved_mb"] == table["predicted_saved_mb"]).all() and (table["official_mb"] > 0).all()
    dense, pruned = (table[table["preset"] == preset].set_index("sparsity") for preset in ("dense", "compact"))
    assert pruned.loc[0.9, "saved_mb"] < 0.2 * dense.loc[0.0, "saved_mb"]
    assert (tmp_path / "tables" / "memory_against_sparsity.png").is_file()
    assert razorlab.main(["table3", "--models", "nosuch", "--dry"]) == 2


def test_an_estimate_counts_the_processes_that_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduction, "_probe", lambda config, classes: (0.1, 0.05))
    monkeypatch.setattr(reproduction, "_start_seconds", lambda: 4.0)
    config = compose_plain("data=digits", "trainer.measure.mode=none")
    measured = compose_plain("data=digits", "trainer.measure.mode=all", "trainer.measure.repeats=2")
    cells = [reproduction.Cell(SimpleNamespace(row=SimpleNamespace(name="full")), c) for c in (config, measured)]
    apart = [reproduction.estimated_seconds([cell]) for cell in cells]
    images, _ = step_shape(measured)
    steps = 2 * WARM_UP_STEPS + 1 + measured["trainer"]["measure"]["steps"]
    assert apart[1] - apart[0] == pytest.approx(2 * (2 * 4.0 + steps * images * 0.1))


def test_rows_that_differ_have_different_names() -> None:
    settings = [
        ("razor=none",),
        ("razor=none", "trainer.micro_batch=4"),
        ("razor=none", "trainer.checkpointing=block"),
        ("razor=int8",),
        ("razor=compact", "razor.sparsity=0.9"),
        ("razor=compact", "razor.sparsity=0.97"),
        ("razor=none", "method=last"),
    ]
    labels = [row_label(compose_plain("data=digits", "trainer.batch_size=8", *each)) for each in settings]
    assert labels[:2] == ["full, dense", "full, dense + micro-batches of 4"]
    assert len(set(labels)) == len(settings)
