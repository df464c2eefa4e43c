"""Atomic writes of files and folders: write under a temporary name, sync to disk, rename, sync the parent folder.

Readers never see an incomplete file or folder under the final name, even after a killed process or a power failure.
"""

import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL_PREFIX = ".partial-"
"""Name prefix of unfinished files and folders. A killed process leaves them behind; see `clear_partials`."""

REPLACED_PREFIX = f"{PARTIAL_PREFIX}old-"
"""Name prefix of a complete folder while it is being replaced."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file next to `path` that is renamed to `path` when the block ends, or deleted on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL_PREFIX}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path` that replaces any folder at `path` when the block ends.

    On an error, the temporary folder is deleted and an existing folder at `path` is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    restore(path)
    tag = uuid.uuid4().hex[:8]
    partial = path.with_name(f"{PARTIAL_PREFIX}{tag}-{path.name}")
    replaced = path.with_name(f"{REPLACED_PREFIX}{tag}-{path.name}")
    try:
        partial.mkdir()
        yield partial
        for folder, _, files in os.walk(partial):
            for file in files:
                sync(Path(folder) / file)
            sync(Path(folder))
        if path.exists():
            path.replace(replaced)
        partial.replace(path)
        sync(path.parent)
    finally:
        restore(path)
        shutil.rmtree(partial, ignore_errors=True)
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)


def restore(path: Path) -> None:
    """Restore the previous folder at `path` if `atomic_folder` was interrupted between its two renames."""
    for replaced in path.parent.glob(f"{REPLACED_PREFIX}{'[0-9a-f]' * 8}-{glob.escape(path.name)}"):
        if not path.exists():
            replaced.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Flush a file, or the directory entries of a folder, to disk."""
    flags = os.O_RDONLY
    if path.is_dir():
        if os.name == "nt":
            return  # folders cannot be opened on Windows
        with suppress(OSError):  # some file systems cannot sync folders
            _sync(path, flags)
        return
    _sync(path, flags if os.name != "nt" else os.O_RDWR)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_partials(folder: Path) -> None:
    """Delete unfinished files and folders that a killed process left directly in `folder`.

    A folder that was being replaced is restored. Call this only when no other process writes to `folder`.
    """
    for replaced in list(folder.glob(f"{REPLACED_PREFIX}*")):
        restore(folder / replaced.name[len(REPLACED_PREFIX) + 9 :])
    for partial in folder.glob(f"{PARTIAL_PREFIX}*"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
