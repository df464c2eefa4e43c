"""From the command line to a composed config: free text is quoted, mistakes become one paragraph and exit code 2."""

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

from ldm.cli.arguments import bracket_lists, check_arguments, escape, gather, mark_new, quote_free_text
from ldm.cli.command_line import SEARCH_PATH, CommandLine
from ldm.cli.explain import explain
from ldm.cli.targets import with_current_targets
from ldm.errors import UserError
from ldm.files.untrusted import one_line
from ldm.runtime import signals
from ldm.runtime.paths import DISTRIBUTION, folder
from ldm.tracking.run import finish_open_run


def construct(config: Any, **options: Any) -> Any:
    """What a part of a config describes, made by Hydra: `_target_` with the rest as its arguments, plain values all."""
    values = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
    # twice: Hydra resolves a config, and every value of it once more when it hands it over
    return instantiate(_escaped(_escaped(values)), _convert_="all", **options)


def main() -> None:
    """`ldm COMMAND ...`: a training, or the script of that name in tools/, with the rest as its arguments."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(_overview())
    elif name == "--version":
        print(f"{DISTRIBUTION} {version(DISTRIBUTION)}")
    elif name == "train":
        del sys.argv[1]
        runpy.run_module("ldm.train", run_name="__main__", alter_sys=True)
    elif (script := folder("tools") / f"{name}.py") in _tools():
        del sys.argv[1]
        runpy.run_path(str(script), run_name="__main__")
    else:
        names = ["train", *(tool.stem for tool in _tools())]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"Did you mean ldm {near[0]}?" if near else f"The commands are: {', '.join(names)}."
        print(one_line(f"error: ldm {name} is not a command. {hint}"), file=sys.stderr)
        sys.exit(2)


def _tools() -> list[Path]:
    return sorted(folder("tools").glob("[a-z]*.py"))


def _overview() -> str:
    """Every command with the first line of its script."""
    lines = {"train": "Train both stages with stage=all, or one with stage=vae or stage=diffusion."}
    lines |= {tool.stem: ast.get_docstring(ast.parse(tool.read_text("utf-8"))) or "" for tool in _tools()}
    rows = [f"  {name:12}{said}" for name, said in lines.items()]
    return "\n".join(["ldm COMMAND [key=value ...]    ldm COMMAND --help shows the options of a command", "", *rows])


def run(
    config_name: str,
    task: Callable[[DictConfig], Any] | str,
    *,
    positional: str | None = None,
    lists: Sequence[str] = (),
) -> None:
    """Compose conf/<config_name>.yaml with the command line and run the task.

    With -m the task runs once per job; one that fails does not keep the others from running.

    Exits with 2 after bad input, with 128 and the number of a signal that ended it. HYDRA_FULL_ERROR=1 shows the
    traceback.

    Args:
        task: A function of the config, or where one is, as package.module:name: --help and a mistake in the options
            do not wait for its imports.
        positional: The key of a list that arguments without a key are gathered in.
        lists: Keys that take several values, as 5,10,20.
    """
    command = _Command(task)
    try:
        check_arguments(command.typed)
        arguments = command.typed if positional is None else gather(command.typed, positional)
        arguments = mark_new(arguments)
        sys.argv[1:] = arguments if command.sweeps else bracket_lists(quote_free_text(arguments), lists)
    except UserError as error:
        command.report(error)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, not to Hydra's own report
    start = hydra.main(version_base="1.3", config_path=str(folder("conf")), config_name=config_name)(command.run_job)
    try:
        with signals.handled():
            start()
    except signals.Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        print("stopped by the user", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if (number := signals.pending()) is not None:  # a library took the interruption for an error of its own
            print(signals.Interrupted(number), file=sys.stderr)
            sys.exit(128 + number)
        command.report(error)
    if failed := command.failed:
        print(one_line(f"error: {len(failed)} of the jobs failed: {'; '.join(failed)}"), file=sys.stderr)
        sys.exit(2)


def compose(options: Sequence[str]) -> DictConfig:
    """The config of another command like this one, with these options as a user types them."""
    command = command_line()
    composed = command.compose(options)
    require_values(composed)
    return as_config(with_current_targets(OmegaConf.to_container(composed, resolve=True)))


def environment_of_children() -> dict[str, str]:
    """For a command that this one starts: whether it shows tracebacks is not up to what `run` asks of Hydra."""
    return {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}


class _Command:
    """One command line: its jobs, and what is said of those that fail."""

    def __init__(self, task: Callable[[DictConfig], Any] | str) -> None:
        self.task = task
        self.typed = sys.argv[1:]
        self.sweeps = any(argument in ("-m", "--multirun") for argument in self.typed)
        self.verbose = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
        self.failed: list[str] = []
        self.composed: dict[str, Any] = {}
        """The config of the job, by which a message names options."""

    def run_job(self, config: DictConfig) -> None:
        """What Hydra calls with each composed config."""
        sys.argv[1:] = self.typed  # for the record, and for the processes that Lightning starts with the same arguments
        try:
            require_values(config)
            values = with_current_targets(OmegaConf.to_container(config, resolve=True))
            self.composed = values
            task = pkgutil.resolve_name(self.task) if isinstance(self.task, str) else self.task
            task(as_config(values))
        except Exception as error:
            if (number := signals.pending()) is not None:
                raise signals.Interrupted(number) from error
            (self.report_job if self.sweeps else self.report)(error)  # here: Hydra would print a line of its own first

    def report(self, error: Exception) -> None:
        """Say what was wrong, and exit with 2; an error of ours is raised."""
        message = explain(error, self.composed)
        if message is None:
            raise error
        if self.verbose:
            traceback.print_exc()
        print(one_line(f"error: {message}"), file=sys.stderr)
        sys.exit(2)

    def report_job(self, error: Exception) -> None:
        """Say what was wrong with a job, and let the others run."""
        job = command_line()
        own = [override for override in job.overrides if override not in self.typed]  # not those of every job
        name = f"job {job.job} ({' '.join(own)})"
        message = explain(error, self.composed)
        if message is None or self.verbose:
            traceback.print_exception(error)
        print(one_line(f"error in {name}: {message or repr(error)}"), file=sys.stderr)
        self.failed.append(name)
        finish_open_run()


def command_line() -> CommandLine:
    """What was typed, once Hydra has composed the config."""
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
    """Resolved values as a config that reads as exactly these: a text with ${ in it is no interpolation of its own."""
    config = OmegaConf.create(_escaped(values))
    OmegaConf.set_struct(config, True)
    OmegaConf.set_readonly(config, True)  # what was checked is what is used
    return config


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_escaped(part) for part in value]
    return escape(value) if isinstance(value, str) else value


def require_values(config: DictConfig) -> None:
    """Every key has a value.

    Raises:
        UserError: naming those that have none.
    """
    if missing := list(_missing(OmegaConf.to_container(config))):
        given = " ".join(f"{key}=..." for key in missing)
        raise UserError(f"Required, and without a default: {', '.join(missing)}. Add to the command line: {given}")


def _missing(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _missing(part, f"{key}.{name}" if key else str(name))
    elif value == "???":
        yield key
