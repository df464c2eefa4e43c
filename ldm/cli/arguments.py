"""What was typed: free text is quoted for Hydra's grammar, arguments without a key and bare lists are gathered."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.files.untrusted import clean_text

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
    "data.cache_dir",
    "autoencoder.path",
    "conditioning.encoder",
    "features_path",
)
"""Keys whose values are text or paths: they reach the config as they were typed, whatever Hydra's grammar says."""
_WHOLE = re.compile(r"(\+*[\w.]+=)(\d+[eE]\+?\d{1,2})")
"""A whole number in powers of ten, which Hydra's grammar takes for a float."""
_WORD = re.compile(r"(?!(?:null|true|false|inf|nan)$|\d[\d_.]*(?:e[+-]?\d+)?$)\w[\w.:/+-]*", re.ASCII | re.IGNORECASE)
"""A text that Hydra's grammar takes as it stands, and for text."""
_OPTIONS_WITH_VALUE: tuple[str, ...] = ("--cfg", "-c", "--package", "-p", "--info", "-i", "--experimental-rerun")
_OPTIONS_WITH_VALUE += ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")
"""Of Hydra: the argument after them is theirs."""


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse arguments that are no text, and the one of Hydra's that reads a pickle.

    Raises:
        UserError: naming it.
    """
    for argument in arguments:
        if "\0" in argument or clean_text(argument) != argument:
            raise UserError(f"{argument!a} is not text in UTF-8. Type it again, or name files without such signs.")
        if argument.startswith("--e"):  # Hydra takes beginnings of an option for the whole
            raise UserError(
                f"{argument} reads a pickle, which can run code, and is not used here. Name the config with "
                "--config-dir= and --config-name= instead."
            )


def quote_free_text(arguments: Sequence[str], keys: Sequence[str] = FREE_TEXT) -> list[str]:
    """Quote the values of free-text keys, so that Hydra's grammar takes them as one string; 1e5 is a whole number."""
    quoted = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        name = without_stage(key.lstrip("+"))
        switch = name == "resume" and value.lower() in ("true", "false")
        if equals and name in keys and not switch and value not in ("null", "???", ""):
            argument = f"{key}={_quote(value)}"
        elif number := _WHOLE.fullmatch(argument):
            argument = f"{number[1]}{int(float(number[2]))}"
        quoted.append(argument)
    return quoted


def without_stage(key: str) -> str:
    """A key of stage=all that is one stage's alone, as that stage has it: stage1.batch_size is batch_size."""
    return key.removeprefix("stage1.").removeprefix("stage2.")


def mark_new(arguments: Sequence[str]) -> list[str]:
    """stage1.KEY= and stage2.KEY= as ++stage1.KEY=: the config of stage=all does not hold them."""
    return [f"++{argument}" if argument != without_stage(argument) else argument for argument in arguments]


def gather(arguments: Sequence[str], key: str) -> list[str]:
    """Arguments without a key become key=[...], each as it was typed.

    One with an equals sign in it is among them where it names something on the disk, as a folder of a sweep does.

    Raises:
        UserError: key= is given as well.
    """
    kept, gathered = [], []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        named = "=" not in argument or Path(argument).expanduser().exists()
        deletes = argument.startswith("~") and not argument.startswith("~/")
        if named and not deletes and not argument.startswith("-") and before not in _OPTIONS_WITH_VALUE:
            gathered.append(argument)
        else:
            kept.append(argument)
    if not gathered:
        return kept
    if any(argument.startswith(f"{key}=") for argument in kept):
        raise UserError(f"{' '.join(gathered)} and {key}= are two ways to say the same. Use one of them.")
    return [*kept, f"{key}=[{','.join(_quote(argument) for argument in gathered)}]"]


def typed(key: str, value: Any) -> str:
    """An override as a user types it: text of FREE_TEXT as it stands, anything else in Hydra's grammar."""
    text = value if key in FREE_TEXT and isinstance(value, str) else _in_grammar(value)
    return f"{key}={text}"


def _in_grammar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_in_grammar, value))}]"
    if isinstance(value, str) and not _WORD.fullmatch(value):
        return _quote(value)
    return str(value)


def _quote(text: str) -> str:
    """Text that Hydra and OmegaConf leave as it is."""
    # in Hydra's grammar a backslash counts as an escape only before a quote
    escaped = _double_backslashes_before_quote(escape(text)).replace('"', '\\"')
    return f'"{escaped}"'


def escape(text: str) -> str:
    """Text without interpolations: OmegaConf takes an odd number of backslashes before ${ as its escape."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def bracket_lists(arguments: Sequence[str], keys: Sequence[str]) -> list[str]:
    """key=5,10,20 as key=[5,10,20]: bare commas are a sweep of runs in Hydra's grammar."""
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
