"""Compose a config from the command line, run a task with it, and print user errors without a traceback."""

import ast
import difflib
import os
import pkgutil
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ldm.cli.arguments import (
    add_stage_keys,
    bracket_lists,
    check_arguments,
    collect_positional,
    escape,
    quote_text_values,
)
from ldm.cli.command_line import SEARCH_PATH, CommandLine
from ldm.cli.explain import explain
from ldm.cli.targets import update_targets
from ldm.errors import UserError
from ldm.files.untrusted import to_one_line
from ldm.runtime import signals
from ldm.runtime.paths import DISTRIBUTION, bundled_folder
from ldm.tracking.run import finish_open_run


def construct(config: Any, **options: Any) -> Any:
    """Instantiate a config node with Hydra: call its `_target_` with the remaining keys as plain keyword arguments."""
    values = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
    # escaped twice, because Hydra resolves the whole config and then each value again
    return instantiate(_escape_all(_escape_all(values)), _convert_="all", **options)


def main() -> None:
    """Entry point of `ldm COMMAND ...`: start training, or run the script with that name in tools/."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(_overview())
    elif name == "--version":
        print(f"{DISTRIBUTION} {version(DISTRIBUTION)}")
    elif name == "train":
        del sys.argv[1]
        runpy.run_module("ldm.train", run_name="__main__", alter_sys=True)
    elif (script := bundled_folder("tools") / f"{name}.py") in _tools():
        del sys.argv[1]
        runpy.run_path(str(script), run_name="__main__")
    else:
        names = ["train", *(tool.stem for tool in _tools())]
        matches = difflib.get_close_matches(name, names, n=1)
        hint = f"Did you mean ldm {matches[0]}?" if matches else f"Available commands: {', '.join(names)}."
        print(to_one_line(f"error: ldm {name} is not a command. {hint}"), file=sys.stderr)
        sys.exit(2)


def _tools() -> list[Path]:
    return sorted(bundled_folder("tools").glob("[a-z]*.py"))


def _overview() -> str:
    """List all commands, each with the docstring of its script."""
    lines = {"train": "Train both stages (stage=all), or one of them (stage=vae or stage=diffusion)."}
    lines |= {tool.stem: ast.get_docstring(ast.parse(tool.read_text("utf-8"))) or "" for tool in _tools()}
    rows = [f"  {name:12}{description}" for name, description in lines.items()]
    return "\n".join(["ldm COMMAND [key=value ...]    ldm COMMAND --help shows the options of a command", "", *rows])


def run(
    config_name: str,
    task: Callable[[DictConfig], Any] | str,
    *,
    positional: str | None = None,
    lists: Sequence[str] = (),
) -> None:
    """Compose conf/<config_name>.yaml with the command line and run the task.

    With -m, the task runs once per job. If a job fails, the remaining jobs still run.

    Exits with code 2 after a user error, and with 128 + n after signal n. HYDRA_FULL_ERROR=1 shows tracebacks.

    Args:
        task: A function that takes the config, or its import path (package.module:name), which is imported only after
            the options have been checked, so that --help and error messages are fast.
        positional: Key that receives a list of all arguments without a key.
        lists: Keys that accept comma-separated values, such as 5,10,20.
    """
    command = _Command(task)
    try:
        check_arguments(command.arguments)
        arguments = command.arguments if positional is None else collect_positional(command.arguments, positional)
        arguments = add_stage_keys(arguments)
        sys.argv[1:] = arguments if command.is_multirun else bracket_lists(quote_text_values(arguments), lists)
    except UserError as error:
        command.report(error)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra must raise errors instead of reporting them itself
    start = hydra.main(version_base="1.3", config_path=str(bundled_folder("conf")), config_name=config_name)(
        command.run_job
    )
    try:
        with signals.handling():
            start()
    except signals.Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        sys.exit(interrupted.code)
    except KeyboardInterrupt:
        print("stopped by the user", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if (number := signals.pending()) is not None:  # a library replaced the Interrupted exception
            print(signals.Interrupted(number), file=sys.stderr)
            sys.exit(128 + number)
        command.report(error)
    if jobs := command.failed_jobs:
        print(to_one_line(f"error: {len(jobs)} of the jobs failed: {'; '.join(jobs)}"), file=sys.stderr)
        sys.exit(2)


def compose(options: Sequence[str]) -> DictConfig:
    """Compose the config that the current command would have with different options, given as typed."""
    config = command_line().compose(options)
    require_values(config)
    return as_config(update_targets(OmegaConf.to_container(config, resolve=True)))


def child_environment() -> dict[str, str]:
    """Return the environment for child processes: the current one without HYDRA_FULL_ERROR, which `run` sets."""
    return {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}


class _Command:
    """Runs the jobs of a command line and reports their errors."""

    def __init__(self, task: Callable[[DictConfig], Any] | str) -> None:
        self.task = task
        self.arguments = sys.argv[1:]
        self.is_multirun = any(argument in ("-m", "--multirun") for argument in self.arguments)
        self.verbose = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
        self.failed_jobs: list[str] = []
        self.job_config: dict[str, Any] = {}
        """Config of the current job, as plain values. Messages take option names from it."""

    def run_job(self, config: DictConfig) -> None:
        """Run the task with a composed config; called by Hydra for each job."""
        sys.argv[1:] = self.arguments  # saved with the run, and reused by the processes that Lightning starts
        try:
            require_values(config)
            values = update_targets(OmegaConf.to_container(config, resolve=True))
            self.job_config = values
            task = pkgutil.resolve_name(self.task) if isinstance(self.task, str) else self.task
            task(as_config(values))
        except Exception as error:
            if (number := signals.pending()) is not None:
                raise signals.Interrupted(number) from error
            # reported here, because Hydra would print an extra line before an error that reaches `run`
            (self.report_job if self.is_multirun else self.report)(error)

    def report(self, error: Exception) -> None:
        """Print the explanation of a user error and exit with code 2; re-raise any other error."""
        message = explain(error, self.job_config)
        if message is None:
            raise error
        if self.verbose:
            traceback.print_exc()
        print(to_one_line(f"error: {message}"), file=sys.stderr)
        sys.exit(2)

    def report_job(self, error: Exception) -> None:
        """Report an error from a job without stopping the remaining jobs."""
        command = command_line()
        swept_options = [option for option in command.overrides if option not in self.arguments]
        name = f"job {command.job} ({' '.join(swept_options)})"
        message = explain(error, self.job_config)
        if message is None or self.verbose:
            traceback.print_exception(error)
        print(to_one_line(f"error in {name}: {message or repr(error)}"), file=sys.stderr)
        self.failed_jobs.append(name)
        finish_open_run()


def command_line() -> CommandLine:
    """Return the current command line. Hydra must have composed the config."""
    state = HydraConfig.get()
    return CommandLine(
        program=sys.argv[0],
        arguments=tuple(sys.argv[1:]),
        overrides=tuple(state.overrides.task),
        search_path=tuple(option for option in state.overrides.hydra if option.startswith(SEARCH_PATH)),
        choices=dict(state.runtime.choices),
        config_name=state.job.config_name,
        job=state.job.num if state.mode == RunMode.MULTIRUN else None,
    )


def as_config(values: Any) -> DictConfig:
    """Create a read-only config from resolved values, with any ${ in text kept verbatim."""
    config = OmegaConf.create(_escape_all(values))
    OmegaConf.set_struct(config, True)
    OmegaConf.set_readonly(config, True)  # so that values cannot change after they have been checked
    return config


def _escape_all(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escape_all(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_escape_all(child) for child in value]
    return escape(value) if isinstance(value, str) else value


def require_values(config: DictConfig) -> None:
    """Check that every required key has a value.

    Raises:
        UserError: if values are missing. The message lists all missing keys.
    """
    if missing := list(_missing_keys(OmegaConf.to_container(config))):
        options = " ".join(f"{key}=..." for key in missing)
        raise UserError(f"Required options are missing: {', '.join(missing)}. Add to the command line: {options}")


def _missing_keys(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _missing_keys(child, f"{key}.{name}" if key else str(name))
    elif value == "???":
        yield key
