"""One training at a time in a run folder."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import Timeout

from ldm.errors import UserError
from ldm.files.atomic import write_text
from ldm.files.lock import alone

WAIT_S = 10.0
"""A process that was killed holds its lock until the workers that it started have noticed, which takes seconds."""


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Nobody else trains in `folder` meanwhile. The lock lies beside it, so that it outlives a deleted run folder, and
    the system takes it from a process that dies.

    Raises:
        UserError: somebody does; naming who, where and since when. Or nothing can be written there.
    """
    folder = folder.absolute().resolve()
    lock = lock_file(folder)
    holder = lock.with_name(f"{lock.name}.txt")
    myself = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    with ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(alone(lock, lambda: WAIT_S))
            write_text(holder, myself)
        except Timeout as error:
            who = f": {holder.read_text(encoding='utf-8')}" if holder.is_file() else ""
            raise UserError(
                f"{folder} is in use by another training{who}. Wait until it has ended, stop it, or "
                "choose another name=."
            ) from error
        except OSError as error:
            raise UserError(
                f"{folder.parent} cannot be written ({error.strerror}). Choose another place for runs with runs_dir=."
            ) from error
        stack.callback(holder.unlink, missing_ok=True)
        yield


def lock_file(folder: Path) -> Path:
    """The lock of a run folder, next to it."""
    return folder.with_name(f".{folder.name}.lock")
