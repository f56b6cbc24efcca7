"""Fine-tune a pretrained image classifier with Back Razor: compose, validate, instantiate, razor, fit, record.

python train.py model=efficientnet_lite0 data=digits razor.sparsity=0.9
python train.py --help
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser  # private, but the only way to have its complaint as one line
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from razorlab.composition import compose_config, described, options, register
from razorlab.errors import Interrupted, RankLost, UserError, one_line
from razorlab.groups import CONFIGS, GROUPS
from razorlab.help import help_text, offered
from razorlab.pairs import recipe_of, with_recipe

LAUNCHER = ("hydra/launcher", "hydra.launcher.")
LOADING_FLAGS = ("--experimental-rerun", "--config-", "-cp", "-cn", "-cd")
# Exit codes; a signal that a run was stopped by gives 128 + its number, as in a shell: 130 Ctrl-C, 143 SIGTERM.
WRONG_INPUT, NOT_FINITE, RANK_LOST, INTERRUPTED = 2, 3, 4, 130
EXPECTED = (UserError, FloatingPointError, RankLost, OmegaConfBaseException)


def refused_name(group: str, argument: str, name: str = "") -> str:
    """Return what is to be said against a name that ``group`` does not offer."""
    names = options()[group]
    close = difflib.get_close_matches(name, names, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"{argument} is not allowed: {offered(group, names, '|')}{hint}"


def explain(error: BaseException) -> str:
    """Return the one line that a wrong command line or configuration ends in."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).removesuffix(".yaml").partition("/")
        if group in GROUPS:
            return refused_name(group, f"{group}={name}", name)
    text = one_line(error)
    if text.startswith("Could not override"):
        text = text.partition(" To append")[0] + " `python train.py --help` lists every key"
    return text


def refused_flag(arguments: list[str]) -> str | None:
    """Return what is to be said against the command line, None where Hydra's parser accepts it.

    Hydra can write files anywhere, call any function that a configuration names and load a pickle: none of that is
    needed here but the choice of a launcher.
    """
    for argument in arguments:
        name, _, value = argument.lstrip("+~").partition("=")
        if name in GROUPS and value in ("", "null") and argument != "experiment=null":
            return refused_name(name, argument)
        if name.startswith(LOADING_FLAGS):
            return f"{name} is not allowed: the configuration is the one in configs/"
        if name.startswith(("hydra.", "hydra/")) and (not name.startswith(LAUNCHER) or "_target_" in argument):
            return f"{name} is not allowed: of Hydra's own keys only hydra/launcher and hydra.launcher.* are"
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            get_args_parser().parse_args(arguments)
    except SystemExit as stop:
        return said.getvalue().strip().splitlines()[-1].partition("error: ")[2] if stop.code else None
    return None


def refused_sweep(arguments: list[str]) -> str | None:
    """Return why this sweep is not possible, None where it is or none is asked for."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"-m", "--multirun"} & set(arguments):
        return "-m starts one run after another and torchrun several processes for one: leave one of them out"
    return None


def run_composed(composed: DictConfig, overrides: Any) -> None:
    """Run the job that Hydra composed from ``overrides``.

    Raises:
        UserError: a setting or file is wrong.
        FloatingPointError: the training's numbers are not finite.
        Interrupted: a signal stopped it.
        RankLost: another process of the job is gone.
    """
    from razorlab.training.run import execute  # here, so that --help and a wrong command line answer at once

    chosen = with_recipe(overrides)
    take_submitit_rank()
    # A run of a sweep over models or data sets finds its recipe here.
    config: Any = compose_config(chosen) if chosen != overrides else OmegaConf.to_container(composed, resolve=True)
    execute(config, HydraConfig.get().runtime.choices.get("experiment"), recipe_of(chosen))


def take_submitit_rank() -> None:
    """Where submitit started several tasks for this job, set the variables that ``torchrun`` would set."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return
    import submitit

    if submitit.JobEnvironment().num_tasks > 1:
        submitit.helpers.TorchDistributedEnvironment().export()


def hydra_app(problems: list[BaseException]) -> Callable[[], None]:
    """Return the command line application. A job's user error goes to ``problems``, since Hydra would print a second
    line about it. In a launcher's own process it is raised instead, for that list is not shared; what is logged there
    begins with the job's number, for others log beside it.
    """
    process = os.getpid()

    @hydra.main(config_path=str(CONFIGS), config_name="train", version_base="1.3")
    def job(composed: DictConfig) -> None:
        apart = os.getpid() != process
        try:
            with console_log(f"[{HydraConfig.get().job.num}] ") if apart else contextlib.nullcontext():
                run_composed(composed, OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False))
        except EXPECTED as error:
            if apart:
                raise
            problems.append(error)

    return job


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--help" in arguments or "-h" in arguments:
        print(help_text(options()))
        return 0
    if arguments[:1] == ["--list"]:
        return list_group(arguments[1:])
    problems: list[BaseException] = []
    try:
        completed = with_recipe(arguments)
    except UserError as error:
        completed, problems = arguments, [error]
    with console_log(), hydra_environment(completed), workers_replaced_in_silence():
        refused = refused_flag(arguments) or refused_sweep(arguments)
        if refused:
            problems.append(UserError(f"{refused}; `python train.py --help` shows what there is"))
        elif not problems:
            try:
                register(completed)
                hydra_app(problems)()
            except (*EXPECTED, HydraException) as error:
                problems.append(error)
            except Interrupted as stop:
                problems.append(stop)
            except KeyboardInterrupt:
                print("train.py: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
                return INTERRUPTED
            except SystemExit as stop:
                return int(stop.code or 0)
    for problem in problems:
        say(problem)
    return exit_code(problems[0]) if problems else 0


def list_group(names: list[str]) -> int:
    """Print a line for each option of the one group in ``names`` and return the exit code."""
    if len(names) != 1 or names[0] not in GROUPS:
        say(UserError.value("--list", " ".join(names), "|".join(GROUPS)))
        return WRONG_INPUT
    print("\n".join(described(names[0])))
    return 0


def say(problem: BaseException) -> None:
    """Print the one line about a problem, unless another process of the job has said or will say it."""
    if getattr(problem, "spoken", int(os.environ.get("RANK", "0")) > 0):
        return
    if os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0"):
        traceback.print_exception(problem)
    print(f"train.py: {explain(problem)}", file=sys.stderr)


def exit_code(problem: BaseException) -> int:
    """Return what a problem is told to the shell by."""
    if isinstance(problem, Interrupted):
        return problem.code
    if isinstance(problem, FloatingPointError):
        return NOT_FINITE
    return RANK_LOST if isinstance(problem, RankLost) else WRONG_INPUT


@contextlib.contextmanager
def console_log(before: str = "") -> Iterator[None]:
    """Show the laboratory's log on the terminal, each line with ``before`` in front."""
    console = logging.StreamHandler()
    console.setFormatter(logging.Formatter(f"{before}%(message)s"))
    logger = logging.getLogger("razorlab")
    logger.setLevel(logging.INFO)
    logger.addHandler(console)
    try:
        yield
    finally:
        logger.removeHandler(console)


@contextlib.contextmanager
def workers_replaced_in_silence() -> Iterator[None]:
    """joblib gives a sweep a new process for one that has grown by 300 MB, between two jobs, and warns of a leak then:
    a run that needs more memory than the one before it in the same process is none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A worker stopped while some jobs were given", UserWarning, r"joblib\.")
        yield


@contextlib.contextmanager
def hydra_environment(arguments: list[str]) -> Iterator[None]:
    """Hand ``arguments`` to Hydra and have it raise its errors; it would print them and exit with code 1."""
    before, sys.argv = sys.argv, [__file__, *arguments]
    wanted = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = before
        if wanted is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = wanted
