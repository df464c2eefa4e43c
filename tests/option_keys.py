"""The keys of each command's config, and those that a message names although its command has no such option."""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import yaml

from ldm.cli.remedies import keys_in
from ldm.runtime.paths import folder

CONF = folder("conf")
COMMANDS = sorted(file.stem for file in CONF.glob("*.yaml") if file.stem != "tool")
PRINTED = re.compile(
    r"""(?:-m\ ldm\.(?P<train>train) | (?:tools|benchmarks)/(?P<tool>\w+)\.py | \bldm\ (?P<console>[a-z]+)\b)
    (?P<options>(?:\s+(?=\S*=|-|\.\.\.)(?:[^\s'"`]|'[^']*'|"[^"]*")+)*)""",
    re.VERBOSE,
)
"""A command inside a message, with its options as they are quoted for a shell; ... stands for some of them."""
OF_TRAININGS = re.compile(r"\btrain=\[([^\]]*)\]")
"""Options that `ldm latents` passes on to trainings."""


@cache
def keys_of(command: str) -> frozenset[str]:
    """Every key and group that the config of a command may have, whatever is chosen."""
    return frozenset(_keys(CONF / f"{command}.yaml", ""))


@cache
def all_keys() -> frozenset[str]:
    return frozenset[str]().union(*map(keys_of, COMMANDS))


def foreign_keys(message: str, command: str, typed: Sequence[str] = ()) -> list[str]:
    """Options that a message names and that its command lacks, or the command that the message prints.

    What was typed may be repeated, and an argument that is no command's option may be shown with its value.
    """
    wrong = []
    for printed in PRINTED.finditer(message):
        name = printed["train"] or printed["tool"] or printed["console"]
        for option in printed["options"].split():
            key = option.strip("'\"").partition("=")[0].lstrip("+~")
            if "=" in option and name in COMMANDS and key in all_keys() - keys_of(name):
                wrong.append(f"{name} {key}=")
    for trained in OF_TRAININGS.finditer(message):
        wrong += [f"train {key}=" for key in keys_in(trained[1]) if key in all_keys() - keys_of("train")]
    own = OF_TRAININGS.sub(" ", PRINTED.sub(" ", message))
    repeated = {key for argument in typed for key in keys_in(argument)}
    return [*wrong, *(f"{key}=" for key in keys_in(own) if key in all_keys() - keys_of(command) - repeated)]


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
