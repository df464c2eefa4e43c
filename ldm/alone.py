"""One process at a time, by a lock file. The system takes the lock back from a process that ends in whatever way."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

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
