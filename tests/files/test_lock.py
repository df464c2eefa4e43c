"""ldm.files.lock: one at a time, whoever waits, is refused or is killed."""

import threading
import time
from pathlib import Path

import pytest
from filelock import Timeout

from ldm.files.lock import FOR_EVER, alone


def test_one_at_a_time_of_many_who_wait(tmp_path: Path) -> None:
    """The file stays: one who waits for it and one who comes later lock the same."""
    file, inside, most = tmp_path / "lock", [], []

    def work() -> None:
        with alone(file, lambda: FOR_EVER):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    with alone(file):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        assert not most
    for thread in threads:
        thread.join()
    assert most == [1] * 4 and file.exists()


def test_refused_at_once_or_after_a_while(tmp_path: Path) -> None:
    with alone(tmp_path / "lock"):
        with pytest.raises(Timeout), alone(tmp_path / "lock"):
            """Not reached."""
        with pytest.raises(UserWarning), alone(tmp_path / "lock", refuse):
            """Not reached."""
    with alone(tmp_path / "lock", refuse):
        """Free again, and nobody is asked."""


def refuse() -> float:
    raise UserWarning
