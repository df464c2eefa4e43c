"""Config keys of each command, and a check that messages mention only options of their command."""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from ldm.cli.remedies import keys_in
from ldm.runtime.paths import bundled_folder

CONF = bundled_folder("conf")
COMMANDS = sorted(file.stem for file in CONF.glob("*.yaml") if file.stem != "tool")
PRINTED_COMMAND = re.compile(
    r"""(?:-m\ ldm\.(?P<train>train) | (?:tools|benchmarks)/(?P<tool>\w+)\.py | \bldm\ (?P<console>[a-z]+)\b)
    (?P<options>(?:\s+(?=\S*=|-|\.\.\.)(?:[^\s'"`]|'[^']*'|"[^"]*")+)*)""",
    re.VERBOSE,
)
"""A command in a message, with shell-quoted options; ... is a placeholder for options."""
TRAINING_OPTIONS = re.compile(r"\btrain=\[([^\]]*)\]")
"""Options that `ldm latents` passes to its training runs."""


@cache
def keys_of(command: str) -> frozenset[str]:
    """Return all keys and groups in the config of a command, with every choice of each group."""
    return frozenset(_keys(CONF / f"{command}.yaml", ""))


@cache
def compose_config(name: str, *overrides: str) -> DictConfig:
    """Compose conf/<name>.yaml with overrides in Hydra's grammar. Raise an error if a key or choice is unknown."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides), return_hydra_config=True)


@cache
def all_keys() -> frozenset[str]:
    return frozenset[str]().union(*map(keys_of, COMMANDS))


def foreign_keys(message: str, command: str, cli_options: Sequence[str] = ()) -> list[str]:
    """Return options in a message that do not exist in its command, or in a command printed by the message.

    A message can repeat options from the command line. Arguments that are not options are ignored.
    """
    foreign = []
    for match in PRINTED_COMMAND.finditer(message):
        name = match["train"] or match["tool"] or match["console"]
        for option in match["options"].split():
            key = option.strip("'\"").partition("=")[0].lstrip("+~")
            if "=" in option and name in COMMANDS and key in all_keys() - keys_of(name):
                foreign.append(f"{name} {key}=")
    for match in TRAINING_OPTIONS.finditer(message):
        foreign += [f"train {key}=" for key in keys_in(match[1]) if key in all_keys() - keys_of("train")]
    prose = TRAINING_OPTIONS.sub(" ", PRINTED_COMMAND.sub(" ", message))
    repeated = {key for argument in cli_options for key in keys_in(argument)}
    return [*foreign, *(f"{key}=" for key in keys_in(prose) if key in all_keys() - keys_of(command) - repeated)]


def _keys(file: Path, package: str) -> Iterator[str]:
    text = file.read_text(encoding="utf-8")
    content = yaml.safe_load(text) or {}
    if text.startswith("# @package _global_"):
        package = ""
    for default in content.pop("defaults", ()):
        if isinstance(default, str):
            if default != "_self_":
                yield from _keys(file.parent / f"{default}.yaml", package)
        elif (group := next(iter(default)).removeprefix("override ").strip("/")).partition("/")[0] != "hydra":
            yield group
            for choice in sorted((CONF / group).glob("*.yaml")):
                yield from _keys(choice, group)
    yield from _nested(content, package)


def _nested(content: dict, prefix: str) -> Iterator[str]:
    for name, value in content.items():
        key = f"{prefix}.{name}".lstrip(".")
        yield key
        if isinstance(value, dict):
            yield from _nested(value, key)
