"""Reading files from disks with transient failures."""

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

RETRY_DELAY_S = 0.5
"""Delay before the single retry."""

MAX_FILE_BYTES = 2**30
"""Maximum size of an image file."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk or an exceeded quota."""

MISSING_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""Errors for a missing file, as opposed to a disk failure."""


def unreadable_error(path: Path, error: OSError) -> InputError:
    """Return the error for a cache that cannot be read because of a disk failure, but may be intact."""
    rule = f"cannot be read ({error.strerror}). The cache was not modified. Retry when the disk is available again"
    return InputError("cache_dir", path, rule)


def is_disk_failure(error: BaseException) -> bool:
    """Return True if the disk failed, False if the file is missing or access to it is denied."""
    return isinstance(error, OSError) and not isinstance(error, (PermissionError, *MISSING_FILE))


_warned_reasons: set[str] = set()
"""Reasons already reported, so that thousands of failures for the same reason cause one warning."""


def retry_once(read: Callable[[], Result]) -> Result:
    """Call `read`, and retry once after a delay if the disk fails.

    Raises:
        OSError: The second attempt also failed, the file is missing, or access is denied.
    """
    try:
        return read()
    except OSError as error:
        if not is_disk_failure(error):
            raise
        if (reason := str(error.strerror)) not in _warned_reasons:
            _warned_reasons.add(reason)
            message = "A file could not be read: %s. Retrying. This warning is shown only once."
            logging.getLogger(__name__).warning(message, reason)
        time.sleep(RETRY_DELAY_S)
        return read()


def read_file(path: Path) -> bytes:
    """Return the contents of a regular file.

    Raises:
        OSError: The file cannot be read.
        ValueError: The path is not a regular file (for example, it is a pipe), or the file exceeds MAX_FILE_BYTES.
    """
    return retry_once(partial(_read_once, path))


def _read_once(path: Path) -> bytes:
    # Without O_NONBLOCK, opening a named pipe would wait forever for a writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        file_stat = os.fstat(descriptor)
        if not stat.S_ISREG(file_stat.st_mode):
            raise ValueError("not a regular file but a pipe, a device or a folder")
        if file_stat.st_size > MAX_FILE_BYTES:
            raise ValueError(f"{file_stat.st_size:,} bytes exceed the limit of {MAX_FILE_BYTES:,} bytes per image file")
        return file.read(MAX_FILE_BYTES)
