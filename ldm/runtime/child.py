"""Running Python in a child process."""

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from ldm.runtime import signals


def run_python(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run this Python interpreter with the given arguments in the foreground, and return its exit code.

    Raises:
        Interrupted: if a signal arrives. It is forwarded to the child process, which exits first.
    """
    with subprocess.Popen([sys.executable, *arguments], env=environment) as process:
        try:
            return process.wait()
        except signals.Interrupted as interrupted:
            if interrupted.signal != signal.SIGINT:  # the terminal sends SIGINT to both processes
                process.send_signal(interrupted.signal)
            raise
