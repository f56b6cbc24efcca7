"""``python -m razorlab``: every command answers, and what is wrong is said in one line."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib.metadata import entry_points

import pytest
from hydra.core.config_store import ConfigStore

from razorlab import __main__ as razorlab
from razorlab.commands.train import workers_replaced_in_silence
from razorlab.composition import register
from razorlab.groups import CONFIGS


@pytest.mark.parametrize("name", razorlab.COMMANDS)
def test_every_command_tells_what_it_takes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = razorlab.main([name, "--help"])
    except SystemExit as stop:  # argparse
        code = stop.code
    assert code in (0, None)
    shown = capsys.readouterr().out
    assert "usage" in shown or "python" in shown


def test_the_usage_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert razorlab.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in razorlab.COMMANDS)
    assert razorlab.main([]) == 2


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert razorlab.main(["nosuch"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nosuch" in line and "train|profile" in line


def test_without_the_laboratory_s_packages_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    for module in [name for name in sys.modules if name.startswith("razorlab.commands.report")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, "razorlab.report.page", raising=False)
    monkeypatch.delitem(sys.modules, "razorlab.report", raising=False)
    assert razorlab.main(["report"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'backrazor[lab]'" in line


def test_it_is_installed_as_backrazor_and_runs_as_a_module() -> None:
    (script,) = entry_points(group="console_scripts", name="backrazor")
    assert script.load() is razorlab.console
    command = [sys.executable, "-m", "razorlab", "train", "--cfg", "job", "experiment=demo/dense"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "efficientnet_lite0" in done.stdout


def test_the_configurations_lie_in_the_package() -> None:
    assert CONFIGS.parent.name == "razorlab" and (CONFIGS / "train.yaml").is_file()


def test_hydra_is_told_of_what_is_asked_for_alone() -> None:
    """It copies its store for each configuration: with every experiment in it that took a second."""
    register(["experiment=table1/pets_full,table1/pets_bias"])
    assert set(ConfigStore.instance().repo["experiment"]) == {"table1"}
    assert len(ConfigStore.instance().repo["experiment"]["table1"]) == 2
    register(["experiment=digits/*"])
    assert len(ConfigStore.instance().repo["experiment"]["digits"]) == 10
    register([])
    assert not {"experiment", "recipe"} & set(ConfigStore.instance().repo)


def test_an_interrupt_ends_in_one_line_that_says_how_to_go_on(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for name, words in (("table3", "the same command goes on with what is missing"), ("measure", "with --missing")):
        monkeypatch.setattr(f"razorlab.commands.{name}.main", interrupt)
        assert razorlab.main([name]) == 130
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"razorlab {name}: interrupted; ") and words in lines[0]


def test_a_sweep_s_process_that_has_grown_is_replaced_in_silence() -> None:
    joblib = pytest.importorskip("joblib")

    def grow() -> None:  # in here, so that a process need not import this file
        executor = __import__("joblib.externals.loky.process_executor", fromlist=["_"])
        executor._MAX_MEMORY_LEAK_SIZE = 1 << 20  # 1 MB is a leak, not 300
        executor._grown = getattr(executor, "_grown", b"") + b"1" * (32 << 20)
        __import__("time").sleep(1.1 * executor._MEMORY_LEAK_CHECK_DELAY)

    def sweep() -> None:
        joblib.Parallel(n_jobs=2)(joblib.delayed(grow)() for _ in range(6))

    with pytest.warns(UserWarning, match="A worker stopped"):  # what joblib says by itself
        sweep()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with workers_replaced_in_silence():
            sweep()
    assert not said
