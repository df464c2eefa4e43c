"""Exclusive locks based on lock files. The operating system releases the lock when a process ends or is killed."""

import glob
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ldm.errors import InputError
from ldm.files.atomic import PARTIAL_PREFIX, restore

FOREVER = -1.0
"""Timeout that never expires."""


@contextmanager
def file_lock(file: Path, wait_s: Callable[[], float] = lambda: 0.0) -> Iterator[None]:
    """Hold an exclusive lock on `file` within the block.

    The lock file is never deleted. Otherwise a process waiting for the old file and a process creating a new one could
    both acquire the lock.

    Args:
        wait_s: Called once if another process holds the lock. Returns the number of seconds to wait.

    Raises:
        Timeout: Another process still holds the lock after that time.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        lock.acquire(timeout=wait_s(), poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def cache_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a cache folder, `.<folder>.lock`, and delete partial folders left by a killed process.

    While one process waits for the lock, another may create the cache folder, so check for the folder inside the block.

    Raises:
        InputError: The parent of the cache folder cannot be created.
    """

    def wait_s() -> float:
        logging.getLogger(__name__).warning("Another process is creating %s. Waiting for it to finish.", folder)
        return FOREVER

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # for example, HOME=/dev/null, or a file exists at this path
        rule = f"cannot be created: {error.strerror}. Set LDM_CACHE to a folder that you can write to"
        raise InputError("cache_dir", folder.parent, rule) from error
    with file_lock(folder.with_name(f".{folder.name}.lock"), wait_s):
        restore(folder)
        for partial in folder.parent.glob(f"{PARTIAL_PREFIX}*-{glob.escape(folder.name)}"):
            shutil.rmtree(partial, ignore_errors=True)
        yield
