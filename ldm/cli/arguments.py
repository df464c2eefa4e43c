"""Translate command-line arguments for Hydra: quote free text, bracket lists, and collect arguments without a key."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.files.untrusted import replace_surrogates

FREE_TEXT = (
    "prompt",
    "prompts",
    "run",
    "against",
    "out",
    "image",
    "images",
    "latents",
    "vae",
    "init_from",
    "resume",
    "name",
    "runs_dir",
    "sweep",
    "losses",
    "train",
    "data.path",
    "data.image_column",
    "data.caption_column",
    "data.label_column",
    "data.cache_dir",
    "autoencoder.path",
    "conditioning.encoder",
    "features_path",
)
"""Keys whose values are text or paths. The values are passed to the config verbatim, not parsed by Hydra."""
_POWER_OF_TEN = re.compile(r"(\+*[\w.]+=)(\d+[eE]\+?\d{1,2})")
"""An integer in scientific notation, such as batch_size=1e3, which Hydra would parse as a float."""
_PLAIN_TEXT = re.compile(
    r"(?!(?:null|true|false|inf|nan)$|\d[\d_.]*(?:e[+-]?\d+)?$)\w[\w.:/+-]*", re.ASCII | re.IGNORECASE
)
"""Text that Hydra parses as a string without quotes."""
_OPTIONS_WITH_VALUE: tuple[str, ...] = ("--cfg", "-c", "--package", "-p", "--info", "-i", "--experimental-rerun")
_OPTIONS_WITH_VALUE += ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")
"""Hydra's options that take the next argument as their value."""


def check_arguments(arguments: Sequence[str]) -> None:
    """Reject arguments that are not valid UTF-8 text, and the Hydra option that unpickles a file.

    Raises:
        UserError: if an argument is rejected.
    """
    for argument in arguments:
        if "\0" in argument or replace_surrogates(argument) != argument:
            raise UserError(
                f"{argument!a} is not valid UTF-8 text. Type it again or, if it is a path, rename the file."
            )
        if argument.startswith("--e"):  # argparse accepts abbreviated options
            raise UserError(
                f"{argument} is not supported: it reads a pickle file, which can run arbitrary code. Use --config-dir= "
                "and --config-name= instead."
            )


def quote_text_values(arguments: Sequence[str], keys: Sequence[str] = FREE_TEXT) -> list[str]:
    """Quote the values of free-text keys so that Hydra parses them as strings, and expand integers such as 1e5."""
    quoted = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        name = strip_stage_prefix(key.lstrip("+"))
        is_switch = name == "resume" and value.lower() in ("true", "false")
        if equals and name in keys and not is_switch and value not in ("null", "???", ""):
            argument = f"{key}={_quote(value)}"
        elif equals and name == "label" and value not in ("null", ""):
            argument = f"{key}={_quote_classes(value)}"
        elif number := _POWER_OF_TEN.fullmatch(argument):
            argument = f"{number[1]}{int(float(number[2]))}"
        quoted.append(argument)
    return quoted


def _quote_classes(value: str) -> str:
    """Quote a class name or a list of them, because Hydra would parse 1_1 as 11 and true as 1."""
    if value.startswith("[") and value.endswith("]"):
        return f"[{','.join(_quote_classes(item.strip()) for item in value[1:-1].split(','))}]"
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value if is_quoted else _quote(value)


def strip_stage_prefix(key: str) -> str:
    """Remove the stage prefix of a key: stage1.batch_size -> batch_size."""
    return key.removeprefix("stage1.").removeprefix("stage2.")


def add_stage_keys(arguments: Sequence[str]) -> list[str]:
    """Rewrite stage1.KEY=... as ++stage1.KEY=..., because the config of stage=all does not define these keys."""
    return [f"++{argument}" if argument != strip_stage_prefix(argument) else argument for argument in arguments]


def collect_positional(arguments: Sequence[str], key: str) -> list[str]:
    """Collect arguments without a key, verbatim, into key=[...].

    Arguments with an equals sign are also collected if they are existing paths, such as a sweep folder lr=1,seed=2.

    Raises:
        UserError: if key= is also present.
    """
    options, positional = [], []
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        has_no_key = "=" not in argument or Path(argument).expanduser().exists()
        deletes_key = argument.startswith("~") and not argument.startswith("~/")
        if has_no_key and not deletes_key and not argument.startswith("-") and previous not in _OPTIONS_WITH_VALUE:
            positional.append(argument)
        else:
            options.append(argument)
    if not positional:
        return options
    if any(argument.startswith(f"{key}=") for argument in options):
        raise UserError(f"{' '.join(positional)} and {key}= set the same option. Use only one of the two forms.")
    return [*options, f"{key}=[{','.join(_quote(argument) for argument in positional)}]"]


def format_option(key: str, value: Any) -> str:
    """Format key=value as typed on the command line: free text verbatim, other values in Hydra's grammar."""
    text = value if key in FREE_TEXT and isinstance(value, str) else _to_hydra_grammar(value)
    return f"{key}={text}"


def _to_hydra_grammar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_to_hydra_grammar, value))}]"
    if isinstance(value, str) and not _PLAIN_TEXT.fullmatch(value):
        return _quote(value)
    return str(value)


def _quote(text: str) -> str:
    """Quote text so that Hydra and OmegaConf return it unchanged."""
    # in Hydra's grammar a backslash is an escape character only before a quote
    escaped = _double_backslashes_before_quote(escape(text)).replace('"', '\\"')
    return f'"{escaped}"'


def escape(text: str) -> str:
    """Escape ${ with an odd number of backslashes, so that OmegaConf does not interpolate."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def bracket_lists(arguments: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Rewrite key=5,10,20 as key=[5,10,20], because Hydra would interpret bare commas as a sweep over runs."""
    bracketed = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        is_list = key.lstrip("+") in keys and "," in value and not value.startswith(("[", "'", '"'))
        bracketed.append(f"{key}=[{value}]" if is_list else argument)
    return bracketed


def _double_backslashes_before_quote(text: str) -> str:
    parts, backslashes = [], 0
    for character in text + "\0":
        if character == "\\":
            backslashes += 1
            continue
        parts.append("\\" * (backslashes * 2 if character in '"\0' else backslashes))
        backslashes = 0
        parts.append(character)
    return "".join(parts)[:-1]
