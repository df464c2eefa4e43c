"""Another Python process in front of the user, which ends before this one does."""

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from ldm.runtime import signals


def run_python(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run this interpreter with other arguments, and return the exit code.

    Raises:
        Interrupted: a signal asked to stop, and was passed on; the process has ended.
    """
    with subprocess.Popen([sys.executable, *arguments], env=environment) as process:
        try:
            return process.wait()
        except signals.Interrupted as stopped:
            if stopped.signal != signal.SIGINT:  # which a terminal sends to both
                process.send_signal(stopped.signal)
            raise
