"""What a source of images is: it says what it holds without reading it, then offers one record per image."""

import hashlib
import importlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from PIL import Image

from ldm.errors import UserError
from ldm.files.reading import retried
from ldm.runtime import shell


@dataclass(frozen=True)
class Record:
    """One image that a source offers, not yet read.

    `content` is what the image's hash is taken from; None takes it from what `load` returns.
    """

    name: str
    load: Callable[[], bytes | Image.Image]
    caption: str | None = None
    label: int | None = None
    content: bytes | None = None
    more_captions: tuple[str, ...] = ()
    """Captions of the same image after the first."""


class Source(Protocol):
    """Where images come from. `class_names` is read after `records` is exhausted."""

    @property
    def name(self) -> str:
        """Names the cache folder; letters, digits, dots and dashes."""

    @property
    def licence(self) -> str | None:
        """What the images ask of those who pass them on."""

    @property
    def class_names(self) -> list[str] | None:
        """What the labels count."""

    @property
    def num_records(self) -> int | None:
        """How many records there will be; None where nobody knows."""

    def identity(self) -> dict[str, Any]:
        """Plain JSON values that change whenever the content may have, found without reading images."""

    def records(self) -> Iterator[Record]:
        """Every image, in an order that is the same each time."""


def optional_module(name: str, extra: str) -> ModuleType:
    """A package that comes with one of our extras.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"This data needs the package {name}: {shell.install_command(extra)}") from error


def folder_name(text: str) -> str:
    """A path or a hub id as one portable part of a file name: `user/set` becomes `user-set`."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.") or "images"


def digest_of_files(root: Path, files: Iterable[Path]) -> str:
    """SHA-256 over the sorted relative names, sizes and modification times: cheap, and edits change it."""
    lines = sorted(f"{path.relative_to(root).as_posix()} {_moment(path)}" for path in files)
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def _moment(path: Path) -> str:
    try:
        stat = retried(path.stat)
    except OSError as error:  # gone meanwhile, or a link that leads nowhere
        return str(error.strerror)
    return f"{stat.st_size} {stat.st_mtime_ns}"
