"""ldm.files.lock: locks are exclusive, and a second caller waits or times out."""

import threading
import time
from pathlib import Path

import pytest
from filelock import Timeout

from ldm.files.lock import FOREVER, file_lock


def test_waiting_threads_hold_the_lock_one_at_a_time(tmp_path: Path) -> None:
    """The lock file is never deleted, so that all threads lock the same file."""
    file, holders, holder_counts = tmp_path / "lock", [], []

    def work() -> None:
        with file_lock(file, lambda: FOREVER):
            holders.append(1)
            holder_counts.append(len(holders))
            time.sleep(0.01)
            holders.pop()

    with file_lock(file):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        assert not holder_counts
    for thread in threads:
        thread.join()
    assert holder_counts == [1] * 4 and file.exists()


def test_held_lock_cannot_be_acquired(tmp_path: Path) -> None:
    with file_lock(tmp_path / "lock"):
        with pytest.raises(Timeout), file_lock(tmp_path / "lock"):
            """Not reached."""
        with pytest.raises(UserWarning), file_lock(tmp_path / "lock", raise_warning):
            """Not reached."""
    with file_lock(tmp_path / "lock", raise_warning):
        """The lock is free, so `raise_warning` is not called."""


def raise_warning() -> float:
    raise UserWarning
