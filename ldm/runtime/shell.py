"""Printable commands that a user can copy and run in the same shell and folder."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.runtime.paths import DISTRIBUTION, bundled_folder

_NEEDS_NO_QUOTES = re.compile(r"-[\w-]+|[\w.:=/\\+][\w.:=/\\+-]*", re.ASCII)
"""Arguments that neither cmd nor PowerShell modifies. PowerShell would split -option=a.b at the dot."""


def join(arguments: Sequence[str], *, windows: bool = os.name == "nt") -> str:
    """Return a command line quoted for a POSIX shell, or on Windows for cmd.

    PowerShell parses the quotes in the same way as cmd, except in arguments that contain ", $ or `.
    """
    if not windows:
        return shlex.join(arguments)
    return " ".join(text if _NEEDS_NO_QUOTES.fullmatch(text) else _double_quote(text) for text in arguments)


def _double_quote(argument: str) -> str:
    """Double-quote an argument for the C runtime, where backslashes are escapes only before a quote."""
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', argument)
    return '"' + re.sub(r"(\\+)$", r"\1\1", escaped) + '"'


def python(*arguments: str) -> str:
    """Return a command for this Python interpreter, using the shortest name that works in the user's shell."""
    return join([_interpreter(), *arguments])


def train_command(*options: str) -> str:
    """Return the command `python -m ldm.train` with the options, quoted for the shell."""
    return python("-m", "ldm.train", *options)


def tool_command(name: str, *options: str) -> str:
    """Return the command `python tools/<name>.py` with the options, quoted for the shell."""
    return python(_display_path(bundled_folder("tools") / f"{name}.py"), *options)


def install_command(extra: str) -> str:
    """Return the command that installs one of this package's extras for this interpreter."""
    return python("-m", "pip", "install", f"{DISTRIBUTION}[{extra}]")


def _interpreter() -> str:
    # not resolved: in a virtual environment, sys.executable is a link
    current, default = Path(sys.executable).absolute(), shutil.which("python")
    if default is not None and Path(default).absolute().parent == current.parent and Path(default).samefile(current):
        return "python"
    return _display_path(current)


def _display_path(path: Path) -> str:
    """Return a path for display, relative if it is below the working directory."""
    cwd = Path.cwd()
    return str(path.relative_to(cwd)) if path.is_relative_to(cwd) else str(path)
