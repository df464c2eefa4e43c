"""A lock that prevents two processes from training in the same run folder."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import Timeout

from ldm.errors import UserError
from ldm.files.atomic import write_text
from ldm.files.lock import file_lock

WAIT_S = 10.0
"""Seconds to wait for the lock. After a process is killed, its workers can hold the lock for a few more seconds."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder, so that no other process trains in it.

    The lock file is next to the folder, so that it survives when the folder is deleted. The operating system releases
    the lock when the process ends.

    Raises:
        UserError: if another process holds the lock (the message names the process, machine and start time), or if
            the parent folder cannot be written.
    """
    folder = folder.absolute().resolve()
    lock = lock_file(folder)
    holder = lock.with_name(f"{lock.name}.txt")
    description = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    with ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(lock, lambda: WAIT_S))
            write_text(holder, description)
        except Timeout as error:
            details = f" ({holder.read_text(encoding='utf-8')})" if holder.is_file() else ""
            raise UserError(
                f"{folder} is in use by another process{details}. Wait for it to finish, stop it, or use another name=."
            ) from error
        except OSError as error:
            raise UserError(
                f"{folder.parent} cannot be written ({error.strerror}). Choose another folder for runs with runs_dir=."
            ) from error
        stack.callback(holder.unlink, missing_ok=True)
        yield


def lock_file(folder: Path) -> Path:
    """Return the path of the lock file of a run folder."""
    return folder.with_name(f".{folder.name}.lock")
