"""Files read whole, from disks that fail for a moment."""

import errno
import logging
import os
import stat
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from ldm.errors import InputError

Result = TypeVar("Result")

PAUSE_S = 0.5
"""Between a failed try and the next; after that the failure stands."""

MAX_FILE_BYTES = 2**30

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a disk answers that has no room, or no more for this user."""

MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""Errors of a file that is not there, and no disk's failure."""


def unreadable(path: Path, error: OSError) -> InputError:
    """What to say of a cache that may be whole, on a disk that does not let it be read."""
    rule = f"cannot be read ({error.strerror}). It is left as it is: repeat the command when its disk answers"
    return InputError("cache_dir", path, rule)


def is_failure(error: BaseException) -> bool:
    """Whether a disk failed, rather than refused a file or had none."""
    return isinstance(error, OSError) and not isinstance(error, (PermissionError, *MISSING))


_SAID: set[str] = set()
"""Ways of failing that were told of: thousands of files may fail alike."""


def retried(read: Callable[[], Result]) -> Result:
    """What `read` returns, tried once more after a pause where the disk fails.

    Raises:
        OSError: it fails again, refuses the file or has none.
    """
    try:
        return read()
    except OSError as error:
        if not is_failure(error):
            raise
        if (reason := str(error.strerror)) not in _SAID:
            _SAID.add(reason)
            logging.getLogger(__name__).warning("A file could not be read: %s. Trying again; said once.", reason)
        time.sleep(PAUSE_S)
        return read()


def read_file(path: Path) -> bytes:
    """A regular file's bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no file but a pipe or the like, or has more than MAX_FILE_BYTES.
    """
    return retried(partial(_read_once, path))


def _read_once(path: Path) -> bytes:
    # Without O_NONBLOCK opening a named pipe waits for a writer, for ever.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("not a regular file but a pipe, a device or a folder")
        if found.st_size > MAX_FILE_BYTES:
            raise ValueError(f"{found.st_size:,} bytes are more than the {MAX_FILE_BYTES:,} that an image may have")
        return file.read(MAX_FILE_BYTES)
