"""One training at a time in a run folder."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import Timeout

from ldm.errors import UserError
from ldm.files.atomic import write_text
from ldm.files.lock import alone

WAIT_FOR_DEAD_S = 15.0
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
    holder = lock.with_name(f"{lock.name}.json")

    def taken() -> float:
        return WAIT_FOR_DEAD_S if _is_dead(_read(holder)) else 0.0

    with ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(alone(lock, taken))
            write_text(holder, json.dumps(_myself()) + "\n")
        except Timeout as error:
            raise UserError(
                f"{folder} is in use by another training: {_describe(_read(holder))}. Wait until it has ended, stop "
                "it, or choose another name=."
            ) from error
        except OSError as error:
            raise UserError(
                f"{folder.parent} cannot be written ({error.strerror}). Choose another place for runs with runs_dir=."
            ) from error
        try:
            yield
        finally:
            with suppress(OSError):
                holder.unlink(missing_ok=True)


def lock_file(folder: Path) -> Path:
    """The lock of a run folder, next to it."""
    return folder.with_name(f".{folder.name}.lock")


def _myself() -> dict[str, object]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _read(holder: Path) -> dict[str, object]:
    try:
        found = json.loads(holder.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_dead(holder: dict[str, object]) -> bool:
    """Whether the holder was a process of this machine that is no longer there."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or type(pid) is not int or os.name == "nt":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _describe(holder: dict[str, object]) -> str:
    if not holder:
        return "it has not yet said which"
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
