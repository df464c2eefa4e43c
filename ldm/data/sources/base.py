"""Interface of image sources. A source describes its contents without reading them, and yields a record per image."""

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
    """One image of a source, not yet read.

    The image's hash is computed from `content`, or from the return value of `load` if `content` is None.
    """

    name: str
    load: Callable[[], bytes | Image.Image]
    caption: str | None = None
    label: int | None = None
    content: bytes | None = None
    more_captions: tuple[str, ...] = ()
    """Captions of the same image after the first."""


class Source(Protocol):
    """Source of images. `class_names` is read after `records` is exhausted."""

    @property
    def name(self) -> str:
        """Name of the cache folder, made of letters, digits, dots and dashes."""

    @property
    def licence(self) -> str | None:
        """Licence under which the images can be redistributed."""

    @property
    def class_names(self) -> list[str] | None:
        """Class names, indexed by label."""

    @property
    def num_records(self) -> int | None:
        """Number of records, or None if unknown."""

    def identity(self) -> dict[str, Any]:
        """Return JSON values that change whenever the content may have changed, without reading images."""

    def records(self) -> Iterator[Record]:
        """Yield a record for every image, in the same order each time."""


def optional_module(name: str, extra: str) -> ModuleType:
    """Import a package that belongs to one of our extras.

    Raises:
        UserError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"This data requires the package {name}: {shell.install_command(extra)}") from error


def folder_name(text: str) -> str:
    """Convert a path or hub id to a portable file name component: `user/set` becomes `user-set`."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.") or "images"


def files_digest(root: Path, files: Iterable[Path]) -> str:
    """Return a SHA-256 digest of the sorted relative names, sizes and modification times of files.

    It is cheap to compute and changes when a file is edited.
    """
    lines = sorted(f"{path.relative_to(root).as_posix()} {_size_and_mtime(path)}" for path in files)
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def _size_and_mtime(path: Path) -> str:
    try:
        stat = retry_once(path.stat)
    except OSError as error:  # deleted in the meantime, or a broken link
        return str(error.strerror)
    return f"{stat.st_size} {stat.st_mtime_ns}"
