"""Signals that stop a command, immediately or once its work is saved.

SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (sent before a preemption) raise `Interrupted` in the main thread, so that the
command unwinds through its `finally` blocks. Training defers signals and checks for a pending signal between steps. A
second SIGINT ends the process immediately, which is safe because files are written atomically. A second SIGINT right
after the first is ignored: it is the same Ctrl-C, sent by the terminal and forwarded by a wrapper.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

DUPLICATE_S = 0.5
"""A SIGINT within this time after the first is a duplicate of it."""

HANDLED_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to stop."""

    def __init__(self, number: int, message: str = "") -> None:
        self.signal = signal.Signals(number)
        super().__init__(message or f"stopped by {self.signal.name}")

    @property
    def code(self) -> int:
        """Exit code: 130 for SIGINT, 143 for SIGTERM, 138 for SIGUSR1."""
        return 128 + self.signal


@dataclass
class _Received:
    number: int | None = None
    interrupted_at: float | None = None
    is_deferring: bool = False


_received = _Received()


def _receive(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if number == signal.SIGINT:
        if _received.interrupted_at is None:
            _received.interrupted_at = now
            if _received.is_deferring:
                os.write(2, b"\nstopping after this step; press Ctrl-C again to stop immediately\n")
        elif now - _received.interrupted_at >= DUPLICATE_S:
            os.write(2, b"stopped immediately\n")
            os._exit(128 + signal.SIGINT)
    if _received.number is None:  # later signals must not interrupt the unwinding
        _received.number = number
        if not _received.is_deferring:
            raise Interrupted(number)


def install_handlers() -> None:
    """Install our handlers, replacing those of libraries. Ignored signals stay ignored."""
    for number in HANDLED_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _receive)


@contextmanager
def handling() -> Iterator[None]:
    """Handle signals in the block as described in the module docstring. Restore the previous handlers afterwards."""
    global _received
    previous = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    _received = _Received()
    install_handlers()
    try:
        yield
    finally:
        _received = _Received()
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def defer() -> None:
    """From now on, record signals without raising. `pending` returns the first one recorded."""
    _received.is_deferring = True
    install_handlers()


def stop_deferring() -> None:
    """Raise on signals again. A signal that was already recorded stays `pending`."""
    _received.is_deferring = False


def pending() -> int | None:
    """Return the first signal that was received, if any."""
    return _received.number


def ignore_in_worker(_: int = 0) -> None:
    """Ignore signals in a worker process: its parent, which receives the same signals, decides when to stop."""
    for number in HANDLED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
