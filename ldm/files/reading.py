"""Files read whole, from disks that fail for a moment and while somebody writes to them."""

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

WAITS_S = (0.1, 0.4, 1.6, 3.2)
"""Between a failed try and the next; after the last the failure stands."""

READINGS = 3
"""How often a file is read that changes meanwhile."""

MAX_FILE_BYTES = 2**30

_NAMES = "EIO ESTALE ETIMEDOUT EAGAIN EBUSY EINTR ENOTCONN ECONNRESET ECONNABORTED EHOSTDOWN EHOSTUNREACH ENETDOWN"
PASSING = frozenset(getattr(errno, name) for name in f"{_NAMES} ENETUNREACH EREMOTEIO".split() if hasattr(errno, name))
"""What a disk answers that may be well in a moment, network folders above all."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a disk answers that has no room, or no more for this user."""


MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""Errors of a file that is not there, and no disk's failure."""


def unreadable(path: Path, error: OSError) -> InputError:
    """What to say of a cache that may be whole, on a disk that does not let it be read."""
    rule = (
        f"cannot be read ({error.strerror}): its disk fails or refuses. The cache is left as it is: repeat the command "
        "when the disk answers"
    )
    return InputError("cache_dir", path, rule)


def retried(read: Callable[[], Result], what: object) -> Result:
    """What `read` returns, tried again after a pause where the disk fails in a way that may pass.

    Raises:
        OSError: it fails still, or in a way that lasts.
    """
    for tries, wait_s in enumerate(WAITS_S):
        try:
            return read()
        except OSError as error:
            # What was listed a moment ago may be in the middle of a replacement; what is gone is not waited for long.
            if error.errno not in PASSING and not (error.errno == errno.ENOENT and tries < 2):
                raise
            _say(str(error.strerror), str(what))
            time.sleep(wait_s)
    return read()


_SAID: set[str] = set()


def _say(reason: str, what: str) -> None:
    """Once for each way of failing: thousands of files may fail alike."""
    if reason not in _SAID:
        _SAID.add(reason)
        logging.getLogger(__name__).warning("%s: %s. Trying again; said once.", what, reason)


def read_file(path: Path) -> bytes:
    """A regular file's bytes as they were at one moment: read again where it changed meanwhile.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no file but a pipe or the like, has more than MAX_FILE_BYTES, or changed at every reading.
    """
    for _ in range(READINGS):
        content = retried(partial(_read_once, path), path)
        if content is not None:
            return content
        time.sleep(WAITS_S[0])
    raise ValueError(f"it changed during each of {READINGS} readings: something is writing to it")


def _read_once(path: Path) -> bytes | None:
    """The file's bytes; None where it is not the same before and after."""
    # Without O_NONBLOCK opening a named pipe waits for a writer, for ever.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise ValueError("not a regular file but a pipe, a device or a folder")
        if before.st_size > MAX_FILE_BYTES:
            raise ValueError(f"{before.st_size:,} bytes are more than the {MAX_FILE_BYTES:,} that an image may have")
        content = file.read(before.st_size + 1)
    after = path.stat()
    moment = (before.st_ino, before.st_size, before.st_mtime_ns)
    return content if (after.st_ino, after.st_size, after.st_mtime_ns) == moment and len(content) == moment[1] else None
