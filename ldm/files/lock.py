"""One process at a time, by a lock file. The system takes the lock back from a process that ends in whatever way."""

import glob
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ldm.files.atomic import PARTIAL, restore

FOR_EVER = -1.0


@contextmanager
def alone(file: Path, taken: Callable[[], float] = lambda: 0.0) -> Iterator[None]:
    """No other process is in the block of the same file.

    The file stays: were it deleted, one who waits for it and one who makes it anew would both get in.

    Args:
        taken: Asked once where another process is in the block: the seconds to wait for its end.

    Raises:
        Timeout: it is in there still.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        lock.acquire(timeout=taken(), poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def made_alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a cache folder, `.<folder>.lock`. Who had to wait should look first whether the folder is there
    now. What a killed process left of a `durable_folder` of that name is deleted.
    """

    def taken() -> float:
        logging.getLogger(__name__).warning("Another process is making %s: waiting for it to end.", folder)
        return FOR_EVER

    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.with_name(f".{folder.name}.lock"), taken):
        restore(folder)
        for left in folder.parent.glob(f"{PARTIAL}*-{glob.escape(folder.name)}"):
            shutil.rmtree(left, ignore_errors=True)
        yield
