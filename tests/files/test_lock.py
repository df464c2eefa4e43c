"""ldm.files.lock: one holder at a time; others wait or are refused."""

import threading
import time
from pathlib import Path

import pytest
from filelock import Timeout

from ldm.files.lock import FOREVER, file_lock


def test_waiting_threads_hold_the_lock_one_at_a_time(tmp_path: Path) -> None:
    """The lock file is kept, so that early and late arrivals lock the same file."""
    file, holders, num_holders = tmp_path / "lock", [], []

    def work() -> None:
        with file_lock(file, lambda: FOREVER):
            holders.append(1)
            num_holders.append(len(holders))
            time.sleep(0.01)
            holders.pop()

    with file_lock(file):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        assert not num_holders
    for thread in threads:
        thread.join()
    assert num_holders == [1] * 4 and file.exists()


def test_held_lock_is_refused(tmp_path: Path) -> None:
    with file_lock(tmp_path / "lock"):
        with pytest.raises(Timeout), file_lock(tmp_path / "lock"):
            """Not reached."""
        with pytest.raises(UserWarning), file_lock(tmp_path / "lock", refuse):
            """Not reached."""
    with file_lock(tmp_path / "lock", refuse):
        """The lock is free, so `refuse` is not called."""


def refuse() -> float:
    raise UserWarning
