"""Another Python process in front of the user, which ends before this one does."""

import subprocess
import sys
from collections.abc import Mapping, Sequence

from ldm.runtime import signals

GRACE_S = 120.0
"""So long a process that was asked to stop may take to save what it has."""


def run_python(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run this interpreter with other arguments, and return the exit code.

    Raises:
        KeyboardInterrupt: a signal asked to stop, and was passed on; the process has ended.
    """
    with subprocess.Popen([sys.executable, *arguments], env=environment) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt as stopped:
            try:
                if isinstance(stopped, signals.Interrupted) and stopped.signal != signals.signal.SIGINT:
                    process.send_signal(stopped.signal)
                process.wait(GRACE_S)  # a terminal's Ctrl-C reached it too
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait()
            raise
    if code - 128 in signals.HANDLED:
        raise signals.Interrupted(code - 128)
    return code
