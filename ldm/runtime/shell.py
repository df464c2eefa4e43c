"""Commands as text that a user can copy: they run in the user's shell, from the folder where they are printed."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.runtime.paths import DISTRIBUTION, folder

_PLAIN = re.compile(r"-[\w-]+|[\w.:=/\\+][\w.:=/\\+-]*", re.ASCII)
"""Arguments that cmd and PowerShell both take as they are. PowerShell splits -option=a.b at the dot."""


def join(arguments: Sequence[str], *, windows: bool = os.name == "nt") -> str:
    """A command line, quoted for a POSIX shell; on Windows for cmd, which PowerShell reads alike but for ", $ and `."""
    if not windows:
        return shlex.join(arguments)
    return " ".join(argument if _PLAIN.fullmatch(argument) else _double(argument) for argument in arguments)


def _double(argument: str) -> str:
    """In double quotes, as the C runtime parses it: backslashes count as escapes only before a quote."""
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', argument)
    return '"' + re.sub(r"(\\+)$", r"\1\1", escaped) + '"'


def python(*arguments: str) -> str:
    """A command of the interpreter of this process, by the shortest name under which the user's shell finds it."""
    return join([_interpreter(), *arguments])


def train_command(*options: str) -> str:
    """`python -m ldm.train` with options as a user types them."""
    return python("-m", "ldm.train", *options)


def tool_command(name: str, *options: str) -> str:
    """`python tools/<name>.py` with options as a user types them."""
    return python(_shown(folder("tools") / f"{name}.py"), *options)


def install_command(extra: str) -> str:
    """The command that installs the packages of one of our extras for this interpreter."""
    return python("-m", "pip", "install", f"{DISTRIBUTION}[{extra}]")


def _interpreter() -> str:
    # not resolved: in a virtual environment it is a link
    ours, found = Path(sys.executable).absolute(), shutil.which("python")
    if found is not None and Path(found).absolute().parent == ours.parent and Path(found).samefile(ours):
        return "python"
    return _shown(ours)


def _shown(path: Path) -> str:
    """A path as the user sees it: relative where it is below the working folder."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
