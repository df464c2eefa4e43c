"""One process at a time makes a cache folder; the others wait for it."""

import glob
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ldm.durable import PARTIAL, restore


@contextmanager
def made_alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a cache folder. Who had to wait should look first whether the folder is there now.

    What a killed process left of a `durable_folder` of that name is deleted. The system takes the lock back from a
    process that ends in whatever way. The lock's file, `.<folder>.lock`, is deleted once the folder stands, and stays
    where making it failed: the next attempt uses it again.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_name(f".{folder.name}.lock")
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logging.getLogger(__name__).warning("Another process is making %s: waiting for it to end.", folder)
        lock.acquire()
    try:
        restore(folder)
        for left in folder.parent.glob(f"{PARTIAL}*-{glob.escape(folder.name)}"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        if folder.exists():
            # Whoever waits for a deleted lock finds the folder made. Windows deletes no open file.
            with suppress(OSError):
                file.unlink()
        lock.release()
