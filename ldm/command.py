"""From the command line to a composed config: free text is quoted, mistakes become one paragraph and exit code 2."""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ldm.errors import UserError
from ldm.home import folder

FREE_TEXT = (
    "prompt",
    "prompts",
    "run",
    "out",
    "image",
    "images",
    "latents",
    "vae",
    "init_from",
    "resume",
    "name",
    "runs_dir",
    "data.path",
    "data.cache_dir",
    "conditioning.encoder",
)
"""Keys whose values are text or paths: they reach the config as they were typed, whatever Hydra's grammar says."""


def run(config_name: str, task: Callable[[DictConfig], Any]) -> None:
    """Compose conf/<config_name>.yaml with the command line and run the task.

    Exits with 2 after bad input, with 130 after Ctrl-C. HYDRA_FULL_ERROR=1 shows the traceback.
    """
    verbose = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
    multirun = any(argument in ("-m", "--multirun") for argument in sys.argv[1:])
    if not multirun:
        sys.argv[1:] = quote_free_text(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, not to Hydra's own report
    application = hydra.main(version_base="1.3", config_path=str(folder("conf")), config_name=config_name)(task)
    try:
        application()
    except KeyboardInterrupt:
        print("stopped by the user", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        if verbose:
            traceback.print_exc()
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def quote_free_text(arguments: Sequence[str], keys: Sequence[str] = FREE_TEXT) -> list[str]:
    """Quote the values of free-text keys, so that Hydra's grammar takes them as one string."""
    quoted = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key.lstrip("+") in keys and value not in ("null", "true", "false", "???", ""):
            escaped = value.replace("${", "\\${")  # no interpolation
            # in Hydra's grammar a backslash counts as an escape only before a quote
            escaped = _double_backslashes_before_quote(escaped).replace('"', '\\"')
            argument = f'{key}="{escaped}"'
        quoted.append(argument)
    return quoted


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


def explain(error: BaseException) -> str | None:
    """One paragraph for a mistake of the user's or of their machine's; None for an error of ours."""
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, UserError):
            return str(cause)
    for cause in chain:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            place = f" at {cause.filename}" if cause.filename else ""
            return (
                f"The disk is full{place}. What was saved before is kept: make room, then continue with the same "
                "command and resume=true, or choose another disk with runs_dir= and data.cache_dir=."
            )
        if isinstance(cause, PermissionError):
            return f"No permission to write or read {cause.filename}. Choose another place with runs_dir= or out=."
    for cause in chain:
        if isinstance(cause, MissingMandatoryValue):
            key = getattr(cause, "full_key", None) or "a value"
            return f"{key} is required and has no default. Give it on the command line: {key}=..."
    if any(isinstance(cause, HydraException | OmegaConfBaseException) for cause in chain):
        # the innermost cause is what a user can act on: a parse error, an unknown choice, a constructor's rule
        message = str(chain[-1] if isinstance(chain[-1], ValueError | TypeError | OmegaConfBaseException) else error)
        return " ".join(message.split()) + " --help lists the choices and the keys."
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
