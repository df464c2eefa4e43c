"""Signals that end a command: at once, or held back until what was done so far is saved.

SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (sent ahead of a preemption) raise `Interrupted` wherever the command is, so that
it unwinds through its `finally` blocks. A training holds them and looks between its steps. A second SIGINT ends the
process where it stands: whatever is on the disk is whole at any moment. One that comes together with the first is the
same Ctrl-C, which the terminal sent and a wrapper passed on.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SAME_S = 0.5
"""A SIGINT so soon after another is the same one."""

HANDLED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """A signal asks to stop; `code` is the exit code that says so: 130 SIGINT, 143 SIGTERM, 138 SIGUSR1."""

    def __init__(self, number: int, message: str = "") -> None:
        self.signal = signal.Signals(number)
        super().__init__(message or f"stopped by {self.signal.name}")

    @property
    def code(self) -> int:
        return 128 + self.signal


@dataclass
class _Received:
    first: int | None = None
    interrupted_at: float | None = None
    held: bool = False


_received = _Received()


def _receive(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if number == signal.SIGINT:
        if _received.interrupted_at is None:
            _received.interrupted_at = now
            if _received.held:
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")
        elif now - _received.interrupted_at >= SAME_S:
            os.write(2, b"stopped at once\n")
            os._exit(128 + signal.SIGINT)
    if _received.first is None:  # one that follows must not break the unwinding of the one before
        _received.first = number
        if not _received.held:
            raise Interrupted(number)


def install_handlers() -> None:
    """Our handlers, over whatever a library has put in their place. A signal that the caller ignores stays ignored."""
    for number in HANDLED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _receive)


@contextmanager
def handled() -> Iterator[None]:
    """Signals end what runs inside, as said above; afterwards they do what they did before."""
    global _received
    before = {number: signal.getsignal(number) for number in HANDLED}
    _received = _Received()
    install_handlers()
    try:
        yield
    finally:
        _received = _Received()
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def hold() -> None:
    """From now on a signal is noted only: look for it with `pending`."""
    _received.held = True
    install_handlers()


def release() -> None:
    """From now on the first signal raises at once again; one that was noted is still `pending`."""
    _received.held = False


def pending() -> int | None:
    """The signal that asks to stop, if there is one."""
    return _received.first


def leave_to_parent(_: int = 0) -> None:
    """For a worker process: the process that started it decides when to stop, also where both are sent the signal."""
    for number in HANDLED:
        signal.signal(number, signal.SIG_IGN)
