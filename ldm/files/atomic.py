"""Files and folders that are whole or not there: written beside, synced to the disk, renamed, the folder synced.

A reader never sees half of one, and neither a kill nor a power cut leaves half of one under its name.
"""

import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial-"
"""Begins the name of what is not finished; what a kill left of it may be deleted when nothing writes."""

REPLACED = f"{PARTIAL}old-"
"""Begins the name of a whole folder in the moment in which another takes its place."""


@contextmanager
def durable_file(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; at the end of the block it takes the name, or is deleted on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def durable_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill; at the end of the block it takes the name, and what had it before is deleted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    restore(path)
    tag = uuid.uuid4().hex[:8]
    partial, replaced = path.with_name(f"{PARTIAL}{tag}-{path.name}"), path.with_name(f"{REPLACED}{tag}-{path.name}")
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
    """Give a folder its name back where an error or a kill came between the two renames of `durable_folder`."""
    for replaced in path.parent.glob(f"{REPLACED}{'[0-9a-f]' * 8}-{glob.escape(path.name)}"):
        if not path.exists():
            replaced.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole."""
    with durable_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Ask the disk to keep a file, or a folder's list of names, now."""
    flags = os.O_RDONLY
    if path.is_dir():
        if os.name == "nt":
            return  # Windows opens no folders
        with suppress(OSError):  # file systems that cannot sync folders say so here
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
    """Delete what a kill left unfinished directly in `folder`, but for a folder that was about to be replaced: it gets
    its name back. Only where nothing else writes there."""
    for replaced in list(folder.glob(f"{REPLACED}*")):
        restore(folder / replaced.name[len(REPLACED) + 9 :])
    for partial in folder.glob(f"{PARTIAL}*"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
