"""Interface for image sources, which describe their contents without reading images and yield one record per image."""

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
from ldm.files.reading import retry_once
from ldm.runtime import shell


@dataclass(frozen=True)
class Record:
    """One image of a source, loaded on demand.

    The image is hashed by its `content` or, if that is None, by the return value of `load`.
    """

    name: str
    load: Callable[[], bytes | Image.Image]
    caption: str | None = None
    label: int | str | None = None
    """Class of the image: its name, or an index into the source's `class_names`."""
    content: bytes | None = None
    more_captions: tuple[str, ...] = ()
    """Captions after the first."""


class Source(Protocol):
    """Image source. Its attributes are read after `records` is exhausted.

    A source can also have the attributes `skipped: Counter[str]`, the number of files not used as images, keyed by
    reason, and `notes: list[str]`, sentences about the data that the user should read.
    """

    @property
    def name(self) -> str:
        """Name for the cache folder, consisting of letters, digits, dots, dashes and underscores."""

    @property
    def licence(self) -> str | None:
        """Licence under which the images can be redistributed."""

    @property
    def class_names(self) -> list[str] | None:
        """Names of all classes, or None to collect them from the records."""

    @property
    def num_records(self) -> int | None:
        """Number of records, or None if unknown."""

    def identity(self) -> dict[str, Any]:
        """Return JSON values that change whenever the content could have changed, without reading images."""

    def records(self) -> Iterator[Record]:
        """Yield a record for every image, in the same order each time."""


def optional_module(name: str, extra: str) -> ModuleType:
    """Import a package from one of our extras.

    Raises:
        UserError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"This data source requires the package {name}: {shell.install_command(extra)}") from error


def folder_name(text: str) -> str:
    """Convert a path or hub id to a portable file name of at most 100 characters: `user/set` becomes `user-set`."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")[:100] or "images"


def files_digest(root: Path, files: Iterable[Path]) -> str:
    """Return a SHA-256 digest of the relative names, sizes and modification times of files.

    It detects edits without reading the files.
    """
    lines = sorted(f"{path.relative_to(root).as_posix()} {_size_and_mtime(path)}" for path in files)
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def _size_and_mtime(path: Path) -> str:
    try:
        stat = retry_once(path.stat)
    except OSError as error:  # deleted meanwhile, or a broken link
        return str(error.strerror)
    return f"{stat.st_size} {stat.st_mtime_ns}"
